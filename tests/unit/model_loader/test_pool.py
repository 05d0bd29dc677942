"""One engine, one user at a time, and none loaded twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import UnavailablePrecisionError, UnknownPrecisionError
from model_loader import pool as module
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.pool import EnginePool


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was loaded, in order. The real loader does the work."""
    done: list[tuple[str, str]] = []

    def counted(model: str, precision: str, **arguments: Any) -> Any:
        done.append((model, precision))
        return load_engine(model, precision, **arguments)

    monkeypatch.setattr(module, "load_engine", counted)
    return done


@pytest.fixture
def pool() -> EnginePool:
    return EnginePool(device="cpu", offline=True, warm_up=False)


def test_an_engine_is_loaded_once_and_lent_again(
    pool: EnginePool, loads: list[tuple[str, str]], toy_folder: Path
) -> None:
    with pool.borrow(str(toy_folder), "fp32") as first:
        pass
    with pool.borrow(str(toy_folder), "float32") as second:
        assert second is first
    assert len(loads) == 1
    assert [report.effective for report in pool.loaded()] == ["fp32"]
    pool.close()


def test_many_threads_asking_at_once_load_once_and_take_turns(
    pool: EnginePool, loads: list[tuple[str, str]], toy_folder: Path
) -> None:
    inside: list[int] = []
    most: list[int] = []

    def use(index: int) -> int:
        with pool.borrow(str(toy_folder), "fp32") as engine:
            inside.append(index)
            most.append(len(inside))
            windows = engine.encode(torch.zeros(1, 80, 3000)).n_windows
            inside.remove(index)
            return windows

    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(use, range(12))) == [1] * 12
    assert len(loads) == 1 and max(most) == 1
    pool.close()


def test_the_old_engine_is_closed_before_the_new_one_loads(
    pool: EnginePool, monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    with pool.borrow(str(toy_folder), "fp32") as old:
        pass

    def checked(*args: Any, **arguments: Any) -> Any:
        with pytest.raises(RuntimeError, match="closed"):
            old.encode(torch.zeros(1, 80, 3000))
        return load_engine(*args, **arguments)

    monkeypatch.setattr(module, "load_engine", checked)
    with pool.borrow(str(toy_folder), "bf16") as new:
        assert new.report.effective == "bf16"
    assert len(pool.loaded()) == 1
    pool.close()


def test_a_larger_pool_keeps_the_engines_used_last(loads: list[tuple[str, str]], toy_folder: Path) -> None:
    pool = EnginePool(device="cpu", offline=True, warm_up=False, capacity=2)
    for precision in ("fp32", "bf16", "fp32", "int8-dynamic"):
        with pool.borrow(str(toy_folder), precision):
            pass
    assert [report.effective for report in pool.loaded()] == ["fp32", "int8-dynamic"]
    assert [precision for _, precision in loads] == ["fp32", "bf16", "int8-dynamic"]
    pool.close()


def test_a_refused_precision_leaves_the_engine_in_memory(pool: EnginePool, toy_folder: Path) -> None:
    with pool.borrow(str(toy_folder), "fp32"):
        pass
    for precision, error in (("fp16", UnavailablePrecisionError), ("fp17", UnknownPrecisionError)):
        with pytest.raises(error), pool.borrow(str(toy_folder), precision):
            pass
    assert [report.effective for report in pool.loaded()] == ["fp32"]
    pool.close()


def test_unload_waits_for_the_user_and_returns_the_number(pool: EnginePool, toy_folder: Path) -> None:
    entered, leave = threading.Event(), threading.Event()
    windows: list[int] = []

    def use() -> None:
        with pool.borrow(str(toy_folder), "fp32") as engine:
            entered.set()
            leave.wait(20)
            windows.append(engine.encode(torch.zeros(1, 80, 3000)).n_windows)

    thread = threading.Thread(target=use)
    thread.start()
    assert entered.wait(20) and pool.is_busy
    threading.Timer(0.1, leave.set).start()
    assert pool.unload(precision="bf16") == 0
    assert windows == [1]  # it waited
    thread.join()
    assert not pool.is_busy
    assert pool.unload(model=toy_folder.name) == 1 and pool.loaded() == ()
    pool.close()


def test_a_failed_load_leaves_the_pool_usable(pool: EnginePool, toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Exception, match="not a Whisper"), pool.borrow(str(tmp_path), "fp32"):
        pass
    with pool.borrow(str(toy_folder), "fp32") as engine:
        assert engine.dims.n_mels == 80
    pool.close()


def test_a_closed_pool_lends_nothing(pool: EnginePool, toy_folder: Path) -> None:
    pool.close()
    with pytest.raises(RuntimeError, match="closed"), pool.borrow(str(toy_folder), "fp32"):
        pass


# --- engines that many share ------------------------------------------------------------------------------------------


def test_a_shared_engine_has_many_users_and_closes_after_the_last(least_folder: Path) -> None:
    pool, leases = EnginePool(device="cpu", offline=True, warm_up=False), [ExitStack(), ExitStack()]
    first = leases[0].enter_context(pool.borrow(str(least_folder), "fp32"))
    assert isinstance(first, FastEngine)
    with ThreadPoolExecutor(1) as executor:  # while this thread holds it
        second = executor.submit(leases[1].enter_context, pool.borrow(str(least_folder), "fp32", "fast")).result(60)
    assert second is first and pool.is_busy
    closed: list[bool] = []
    waiting = threading.Thread(target=lambda: closed.append(pool.unload() == 1))
    waiting.start()
    for lease in leases:
        waiting.join(0.2)
        assert not closed and first.encode(torch.zeros(1, 80, 3000)).n_windows == 1
        lease.close()
    waiting.join(60)
    assert closed == [True] and not pool.is_busy
    with pytest.raises(RuntimeError, match="closed"):
        first.encode(torch.zeros(1, 80, 3000))


def test_the_kind_of_engine_is_part_of_what_is_asked_for(loads: list[tuple[str, str]], least_folder: Path) -> None:
    pool = EnginePool(device="cpu", offline=True, warm_up=False, capacity=2)
    found = []
    for kind in ("auto", "fast", "reference", "auto", "reference"):
        with pool.borrow(str(least_folder), "fp32", kind) as engine:
            found.append(engine.report.engine)
    assert found == ["fast", "fast", "reference", "fast", "reference"]
    assert len(loads) == 2
    pool.close()


def test_auto_takes_the_reference_engine_again_where_it_had_to(
    pool: EnginePool, loads: list[tuple[str, str]], toy_folder: Path
) -> None:
    for kind in ("auto", "auto", "reference"):
        with pool.borrow(str(toy_folder), "fp32", kind) as engine:
            assert engine.report.engine == "reference" and "32 wide" in engine.report.engine_reason
    assert len(loads) == 1
    with (
        pytest.raises(UnavailablePrecisionError, match="Choose --engine auto"),
        pool.borrow(str(toy_folder), "fp32", "fast"),
    ):
        pass
    pool.close()


def test_what_auto_would_take_is_what_it_takes(least_folder: Path) -> None:
    pool = EnginePool(device="cpu", offline=True, warm_up=False)
    row, reason = pool.choose(str(least_folder))
    assert pool.loaded() == ()
    with pool.borrow(str(least_folder), "auto") as engine:
        assert engine.report.requested == row.name
        assert str(engine.report.precision_choice).split(";")[0] == reason.split(";")[0], (
            "free memory changes meanwhile"
        )
    pool.close()
