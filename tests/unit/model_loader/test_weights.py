"""From a model's name to a whole checkpoint: folders, the cache, a Hub on 127.0.0.1, broken lines, and 'auto'."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import DiskFullError, ModelUnavailableError, NotWhisperError, UnknownModelError
from model_loader import hub as hub_module
from model_loader import transfer, weights
from model_loader.device import DeviceInfo
from model_loader.header import find_header
from model_loader.hub import DownloadProgress
from model_loader.loader import load_engine
from model_loader.names import DEMO_FOLDER, MODELS, read_name
from model_loader.weights import Checkpoint, ask_hub_ahead, resolve_checkpoint
from tests.unit.model_loader.hub_server import COMMIT, Hub, serve

NOBODY = "http://127.0.0.1:9"
"""Nothing listens there."""


@pytest.fixture
def hub(toy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Repositories: a Whisper with more than a load needs, and another architecture. Large means 0.7 MB here."""
    monkeypatch.setattr(hub_module, "_LARGE_BYTES", 700_000)
    monkeypatch.setattr(transfer, "PAUSE_S", 0.0)
    whisper = shutil.copytree(toy_folder, tmp_path / "served")
    (whisper / "pytorch_model.bin").write_bytes(b"the same weights again")
    (whisper / "README.md").write_text("not needed", encoding="utf-8")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    shutil.copy(whisper / "model.safetensors", other)
    with serve({"someone/whisper-toy": whisper, "openai/whisper-base": whisper, "someone/bert": other}) as server:
        yield server


@pytest.fixture
def resolve(cpu: DeviceInfo, tmp_path: Path, hub: Hub) -> object:
    """resolve_checkpoint with this test's own cache and Hub."""

    def call(model: str, **changes: object) -> Checkpoint:
        arguments = {"device": cpu, "mirror": hub.address, "cache_dir": tmp_path / "cache", **changes}
        return resolve_checkpoint(model, **arguments)

    return call


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(cpu: DeviceInfo, toy_folder: Path) -> None:
    found = resolve_checkpoint(str(toy_folder), device=cpu)
    assert (found.folder, found.name, found.source, found.revision) == (toy_folder, toy_folder.name, "folder", None)
    assert found.config["d_model"] == 64 and not found.is_demo


def test_the_demo_is_known_by_name_and_by_folder(cpu: DeviceInfo, demo_folder: Path) -> None:
    for model in ("demo", str(demo_folder)):
        found = resolve_checkpoint(model, device=cpu, offline=True)
        assert found.is_demo and found.name == "demo" and found.folder == demo_folder


@pytest.mark.parametrize(
    "model", ["no/such/folder", "~nobody/whisper", "../nowhere", "large-v9", "", "./demo.bin", "https://example.org"]
)
def test_what_is_neither_folder_nor_name_is_unknown(cpu: DeviceInfo, model: str) -> None:
    with pytest.raises(UnknownModelError, match=r"no folder and no name on the Hub.*large-v3"):
        resolve_checkpoint(model, device=cpu, offline=True)


@pytest.mark.parametrize("model", ["foo/bar--baz", "foo/x.git"])
def test_a_name_that_the_hub_forbids_is_a_sentence(cpu: DeviceInfo, model: str) -> None:
    with pytest.raises(UnknownModelError, match=model):
        resolve_checkpoint(model, device=cpu, offline=True)


def _broken(toy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_folder, tmp_path / "broken"))


def test_another_architecture_is_refused(cpu: DeviceInfo, toy_folder: Path, tmp_path: Path) -> None:
    folder = _broken(toy_folder, tmp_path)
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}', encoding="utf-8")
    with pytest.raises(NotWhisperError, match="a wav2vec2 model, not a Whisper"):
        resolve_checkpoint(str(folder), device=cpu)


def test_a_folder_without_config_is_refused(cpu: DeviceInfo, tmp_path: Path) -> None:
    with pytest.raises(NotWhisperError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path), device=cpu)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(cpu: DeviceInfo, toy_folder: Path, tmp_path: Path, name: str) -> None:
    folder = _broken(toy_folder, tmp_path)
    (folder / name).unlink()
    (folder / "vocab.json").unlink()
    with pytest.raises(ModelUnavailableError, match="model.safetensors" if name.startswith("model") else "vocab.json"):
        resolve_checkpoint(str(folder), device=cpu)


def test_a_missing_shard_is_named(cpu: DeviceInfo, demo_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_folder, tmp_path / "shards"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve_checkpoint(str(folder), device=cpu)


def test_a_file_that_is_cut_off_is_noticed_before_it_is_loaded(
    cpu: DeviceInfo, toy_folder: Path, tmp_path: Path
) -> None:
    folder = _broken(toy_folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100_000])
    with pytest.raises(ModelUnavailableError, match=r"is cut off: \d\.\d of \d\.\d MB"):
        resolve_checkpoint(str(folder), device=cpu)
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(ModelUnavailableError, match="is not a safetensors file"):
        resolve_checkpoint(str(folder), device=cpu)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_download_fetches_what_a_load_needs_and_keeps_the_commit(resolve: object, hub: Hub) -> None:
    seen: list[DownloadProgress] = []
    found = resolve("someone/whisper-toy", on_progress=seen.append)
    assert (found.source, found.revision, found.name) == ("hub", COMMIT, "someone/whisper-toy")
    names = {path.name for path in found.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "README.md"}
    sizes = sum(path.stat().st_size for path in found.folder.iterdir())
    assert seen[-1] == DownloadProgress("someone/whisper-toy", sizes, sizes)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen) and len(seen) > 2
    engine = load_engine(str(found.folder), "fp32", device="cpu", warm_up=False)
    assert (engine.report.revision, engine.report.model) == (COMMIT, "someone/whisper-toy")
    engine.close()


def test_the_second_start_asks_nobody(resolve: object, hub: Hub) -> None:
    resolve("someone/whisper-toy")
    hub.requests.clear()
    for changes in ({}, {"offline": True}, {"mirror": NOBODY}):
        found = resolve("someone/whisper-toy", **changes)
        assert (found.source, found.revision) == ("cache", COMMIT)
    assert resolve(f"someone/whisper-toy@{COMMIT}", offline=True).revision == COMMIT
    assert hub.requests == []


def test_a_broken_line_is_continued_where_it_stopped(resolve: object, hub: Hub) -> None:
    hub.cut_after_bytes, hub.cuts_left = 300_000, 2
    found = resolve("someone/whisper-toy")
    assert hub.transfers("model.safetensors") == [None, "bytes=300000-", "bytes=600000-"]
    served = hub.repositories["someone/whisper-toy"] / "model.safetensors"
    assert (found.folder / "model.safetensors").read_bytes() == served.read_bytes()


def test_a_download_given_up_is_no_checkpoint_and_goes_on_at_the_next_start(
    resolve: object, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_after_bytes, hub.cuts_left = 300_000, 1
    monkeypatch.setattr(transfer, "RETRIES", 1)
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        resolve("someone/whisper-toy")
    monkeypatch.undo()
    monkeypatch.setattr(hub_module, "_LARGE_BYTES", 700_000)
    with pytest.raises(ModelUnavailableError, match="not complete in the cache and --offline forbids"):
        resolve("someone/whisper-toy", offline=True)
    assert resolve("someone/whisper-toy").source == "hub"
    assert hub.transfers("model.safetensors") == [None, "bytes=300000-"]


def test_a_damaged_file_is_refused_and_fetched_again(resolve: object, hub: Hub) -> None:
    hub.damages = True
    with pytest.raises(ModelUnavailableError, match="the file that arrived is damaged"):
        resolve("someone/whisper-toy")
    hub.damages = False
    assert resolve("someone/whisper-toy").source == "hub"


def test_a_line_that_stays_broken_is_given_up_with_a_sentence(resolve: object, hub: Hub) -> None:
    hub.cut_after_bytes, hub.cuts_left = 0, 99
    with pytest.raises(ModelUnavailableError, match=r"could not be fetched from http://127.*Try again to go on"):
        resolve("someone/whisper-toy")


def test_a_server_that_ignores_ranges_starts_the_file_again(tmp_path: Path, toy_folder: Path) -> None:
    source, target = toy_folder / "model.safetensors", tmp_path / "blob"
    (tmp_path / "blob.part").write_bytes(b"x" * 1000)
    size, told = source.stat().st_size, list[int]()
    with serve({"a/b": toy_folder}) as server:
        server.ignores_ranges = True
        url = f"{server.address}/a/b/resolve/main/model.safetensors"
        transfer.fetch(url, target, n_bytes=size, checksum="", headers={}, on_bytes=told.append)
    assert target.read_bytes() == source.read_bytes()
    assert told[:2] == [1000, -1000] and sum(told) == size


def test_another_architecture_is_refused_before_its_weights_are_fetched(resolve: object, hub: Hub) -> None:
    with pytest.raises(NotWhisperError, match="someone/bert is a bert model"):
        resolve("someone/bert")
    assert hub.transfers("model.safetensors") == []


def test_an_unknown_repository_and_a_silent_hub_are_told_apart(resolve: object) -> None:
    with pytest.raises(UnknownModelError, match="knows no model 'someone/nothing'"):
        resolve("someone/nothing")
    with pytest.raises(ModelUnavailableError, match="could not be fetched"):
        resolve("someone/whisper-toy", mirror=NOBODY)


def test_offline_fails_at_once(resolve: object, hub: Hub) -> None:
    started_s = time.monotonic()
    with pytest.raises(ModelUnavailableError, match="--offline forbids"):
        resolve("someone/whisper-toy", offline=True)
    assert time.monotonic() - started_s < 1 and hub.requests == []


def test_a_full_disk_is_noticed_before_the_download(resolve: object, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(DiskFullError, match=r"takes 0\.0 GB and the disk of .* has 0\.0 GB free"):
        resolve("someone/whisper-toy")
    assert hub.transfers("model.safetensors") == []


def test_a_disk_that_fills_up_during_the_download_is_a_sentence(
    resolve: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "fetch", full)
    with pytest.raises(DiskFullError, match="became full while someone/whisper-toy was downloaded"):
        resolve("someone/whisper-toy")


# --- auto ------------------------------------------------------------------------------------------------------------


def test_auto_without_network_is_the_demo_within_seconds(resolve: object) -> None:
    started_s = time.monotonic()
    found = resolve("auto", mirror="http://10.255.255.1")  # packets to nowhere
    assert time.monotonic() - started_s < 4
    assert found.is_demo and "does not answer" in str(found.choice)


def test_a_hub_asked_ahead_is_waited_for_beside_other_work(
    resolve: object, hub: Hub, cpu: DeviceInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_hub_ahead("auto", cpu, mirror="http://10.255.255.1", cache_dir=tmp_path)
    time.sleep(1.0)  # other work
    started_s = time.monotonic()
    assert resolve("auto", mirror="http://10.255.255.1").is_demo
    assert time.monotonic() - started_s < 2.5
    assert hub_module._asked == {}

    ask_hub_ahead("auto", cpu, mirror=hub.address, cache_dir=tmp_path)
    assert resolve("auto", device=cpu).source == "hub"
    asked = len(hub.requests)
    ask_hub_ahead("auto", cpu, mirror=hub.address, cache_dir=tmp_path / "cache")  # it is there now
    ask_hub_ahead("demo", cpu, mirror=hub.address, cache_dir=tmp_path)
    assert hub_module._asked == {} and len(hub.requests) == asked, "nobody is asked in vain"


def test_auto_fetches_what_fits_from_a_hub_that_answers(resolve: object, cpu: DeviceInfo) -> None:
    found = resolve("auto", device=replace(cpu, n_cores=2))
    assert (found.name, found.source) == ("openai/whisper-base", "hub")
    again = resolve("auto", device=replace(cpu, n_cores=2), offline=True)
    assert (again.name, again.source) == ("openai/whisper-base", "cache")


def test_auto_takes_another_one_from_the_cache_before_the_demo(resolve: object, cpu: DeviceInfo) -> None:
    resolve("openai/whisper-base")
    found = resolve("auto", device=replace(cpu, n_cores=16), mirror=NOBODY)  # would like small
    assert found.name == "openai/whisper-base"
    assert found.choice == (
        "openai/whisper-base is on this disk; openai/whisper-small is not, and the Hub does not answer."
    )


def test_auto_falls_back_when_the_hub_answers_but_does_not_deliver(resolve: object, hub: Hub, cpu: DeviceInfo) -> None:
    hub.cut_after_bytes, hub.cuts_left = 0, 99
    found = resolve("auto", device=replace(cpu, n_cores=2))
    assert found.is_demo and "fetching it failed" in str(found.choice)


@pytest.mark.parametrize(
    ("free_gib", "wanted"), [(140, "large-v3"), (5, "large-v3-turbo"), (3, "small"), (1.5, "base"), (0.2, "tiny")]
)
def test_auto_wants_what_fits_into_the_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: float, wanted: str) -> None:
    monkeypatch.setattr(weights, "free_bytes", lambda device: int(free_gib * 2**30))
    gpu = DeviceInfo("cuda", 0, "NVIDIA Test", (8, 0), 2**37, 8)
    assert weights.fitting(gpu)[0].short_name == wanted


def test_a_cached_index_that_is_damaged_is_a_sentence(cpu: DeviceInfo, demo_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_folder, tmp_path / "index"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weights": 1}), encoding="utf-8")
    with pytest.raises(ModelUnavailableError, match="is damaged"):
        resolve_checkpoint(str(folder), device=cpu)


# --- names and damaged files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Tiny", "openai/whisper-tiny"),
        ("whisper-base", "openai/whisper-base"),
        ("OpenAI/Whisper-Small", "openai/whisper-small"),
        ("large", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v2", "openai/whisper-large-v2"),
        ("openai/whisper-large", "openai/whisper-large"),
        ("tiny.en", "openai/whisper-tiny.en"),
        ("someone/Whisper-Own", "someone/Whisper-Own"),
        ("DEMO", "demo"),
        ("Auto", "auto"),
    ],
)
def test_a_name_means_the_same_to_a_plan_and_to_a_load(
    given: str, name: str, cpu: DeviceInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_name(given).name == name
    if name == "auto":
        return
    if name.startswith("openai/"):
        assert find_header(given, offline=True, cache_dir=tmp_path).name == name
    if name == "demo":
        assert resolve_checkpoint(given, device=cpu).is_demo and find_header(given).name == "demo"
        return
    with pytest.raises(ModelUnavailableError, match=rf"{name} is not complete in the cache"):
        resolve_checkpoint(given, device=cpu, offline=True, cache_dir=tmp_path)


def test_a_folder_comes_before_a_name_written_in_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Demo", "Tiny"):
        Path(name).mkdir()
        assert read_name(name).folder == Path(name)
    assert read_name("demo").folder == DEMO_FOLDER


def test_the_sentences_on_an_unknown_name_are_one(cpu: DeviceInfo) -> None:
    said = []
    for find in (lambda name: resolve_checkpoint(name, device=cpu), find_header):
        with pytest.raises(UnknownModelError) as caught:
            find("large-v9")
        said.append(str(caught.value))
    assert said[0] == said[1] and all(known.short_name in said[0] for known in MODELS)


def _with_table(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another table at the head of the safetensors file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        table = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
        file.write_bytes(len(table).to_bytes(8, "little") + table + whole[8 + length :])

    return damage


def _with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")

    return damage


def _with_index(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    return damage


def _odd_shape(table: dict[str, Any]) -> dict[str, Any]:
    next(entry for name, entry in table.items() if name != "__metadata__")["shape"] = ["x"]
    return table


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_with_table(lambda table: []), "its table is a list"),
        (_with_table(lambda table: None), "its table is null"),
        (_with_table(_odd_shape), r"of shape \['x'\]"),
        (_with_index("[]"), "holds a list"),
        (_with_index('{"weight_map": {"a": 3}}'), "is damaged"),
        (_with_index('{"weight_map": {"a": "../b.safetensors"}}'), "is damaged"),
        (_with_config(d_model=-4), "d_model is -4"),
        (_with_config(d_model=0), "d_model is 0"),
        (_with_config(d_model=float("inf")), "d_model is Infinity"),
        (_with_config(vocab_size=10), "vocab_size is 10"),
        (_with_config(decoder_attention_heads=7), "decoder_attention_heads is 7"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    ],
)
def test_a_damaged_checkpoint_is_a_sentence_to_a_plan_and_to_a_load(
    damage: Callable[[Path], None], part: str, cpu: DeviceInfo, toy_folder: Path, tmp_path: Path
) -> None:
    folder = _broken(toy_folder, tmp_path)
    damage(folder)
    for find in (find_header, lambda name: resolve_checkpoint(name, device=cpu)):
        with pytest.raises(ModelUnavailableError, match=part):
            find(str(folder))


def test_a_damaged_generation_config_is_said_before_a_load(cpu: DeviceInfo, toy_folder: Path, tmp_path: Path) -> None:
    folder = _broken(toy_folder, tmp_path)
    (folder / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelUnavailableError, match=r"generation_config\.json cannot be read"):
        resolve_checkpoint(str(folder), device=cpu)


def test_sizes_are_told_before_weights_are_fetched(resolve: object, hub: Hub) -> None:
    told: list[tuple[str, int, list[object]]] = []
    resolve(
        "someone/whisper-toy",
        on_sizes=lambda name, sizes: told.append((name, sizes.d_model, hub.transfers("model.safetensors"))),
    )
    assert told == [("someone/whisper-toy", 64, [])]
