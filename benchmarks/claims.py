"""What articles say about 8-bit models, answered with the figures of one run. No figure here is anyone else's.

In: the rows that benchmarks.precision measured. Out: sentences; a claim whose rows were not measured says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def answers(results: Sequence[Row]) -> list[str]:
    """A sentence or two per claim."""
    rows = {result["row"]: result for result in results if "load_s" in result}
    base16 = next((rows[name] for name in ("fp16", "bf16") if name in rows), None)
    return [
        *_memory_claim(rows.get("fp32"), base16, rows.get("int8-static")),
        *_speed_claim(rows.get("fp32"), base16, rows.get("int8-static")),
        *_slowness_claim(base16, rows.get("bnb-int8")),
    ]


def _memory_claim(fp32: Row | None, base16: Row | None, static: Row | None) -> list[str]:
    claim = "Articles: static INT8 takes 60 % less memory."
    if fp32 is None or static is None:
        return [f"{claim} Not answered: fp32 or int8-static was not measured."]
    parts = [f"weights {_less(static, base, 'weights_mib')} of {base['row']}'s" for base in (fp32, base16) if base]
    parts += [
        f"peak at batch {label} {_less(static, base, key)} of {base['row']}'s"
        for key, label in (("peak_1_mib", "1"), ("peak_n_mib", "N"))
        for base in (fp32, base16)
        if base and static.get(key) and base.get(key)
    ]
    return [
        f"{claim} Here: {'; '.join(parts)}. Only linear weights shrink to a quarter of 32 bits; embeddings, norms and "
        "convolutions keep 16 bits (on a processor 32), and caches and activations of a batch are not weights."
    ]


def _speed_claim(fp32: Row | None, base16: Row | None, static: Row | None) -> list[str]:
    claim = "Articles: static INT8 is 1.9 times as fast."
    if fp32 is None or static is None:
        return [f"{claim} Not answered: fp32 or int8-static was not measured."]
    keys = (
        ("encoder_n_ms", "encoder, batch N"),
        ("token_1_ms", "a token, batch 1"),
        ("token_n_ms", "a token, batch N"),
    )
    against = [
        f"against {base['row']} " + ", ".join(f"{label} {base[key] / static[key]:.2f}x" for key, label in keys)
        for base in (fp32, base16)
        if base
    ]
    return [f"{claim} Here: {'; '.join(against)}. {_why_speed(static, base16 or fp32)}"]


def _why_speed(static: Row, base: Row) -> str:
    """The counted reason, as far as this run has one."""
    kernels = _per_token(static, base, "kernels_per_token", "kernels")
    operators = _per_token(static, base, "operators_per_token", "operators")
    counted = kernels or operators
    why = f", and its time follows the host's work: {counted}" if counted else ""
    return f"The encoder's large products gain where int8 arithmetic is faster; a token's are small{why}."


def _slowness_claim(base16: Row | None, bnb: Row | None) -> list[str]:
    claim = "Articles: bitsandbytes in 8 bit is up to 5 times slower."
    if base16 is None or bnb is None:
        return [f"{claim} Not answered: bnb-int8 or a 16-bit row was not measured."]
    name = base16["row"]
    ratios = ", ".join(
        f"{label} {bnb[key] / base16[key]:.1f} times {name}'s time"
        for key, label in (
            ("token_1_ms", "a token at batch 1"),
            ("token_n_ms", "a token at batch N"),
            ("encoder_n_ms", "the encoder at batch N"),
        )
    )
    counted = [
        _per_token(bnb, base16, key, what)
        for key, what in (
            ("operators_per_token", "operators"),
            ("kernels_per_token", "kernels"),
            ("waits_per_token", "waits of the host for the GPU"),
        )
    ]
    reasons = "; ".join(part for part in counted if part)
    engines = [row.get("engine") for row in (bnb, base16)]
    apart = "" if engines[0] == engines[1] else f", {engines[0]} engine against {engines[1]}"
    found = f"{claim} Here: {ratios}{apart}." + (f" Counted: {reasons}." if reasons else "")
    why = "LLM.int8() looks for outlying activations before every product and multiplies those columns in 16 bits."
    return [f"{found} {why}"]


def _less(row: Row, base: Row, key: str) -> str:
    return f"{100 * (row[key] / base[key] - 1):+.0f} %"


def _per_token(row: Row, base: Row, key: str, what: str) -> str:
    if row.get(key) is None or base.get(key) is None:
        return ""
    return f"{row[key]:.0f} {what} a token ({base['row']}: {base[key]:.0f})"
