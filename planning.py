"""`app.py plan`: which precision of a model fits this machine, and which GPUs it would fit. Loads nothing.

Arguments -> model_loader.plan -> a table or JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from settings import Settings
from terminal import quiet_libraries, say

BATCHES = "1,8,32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--batch", default=BATCHES, metavar="N,N", help=f"windows decoded together, with commas. Default: {BATCHES}."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def plan(arguments: argparse.Namespace, settings: Settings) -> int:
    """Predicted memory of every precision (or of the one asked for) here, and of OpenAI's sizes on common GPUs."""
    quiet_libraries()
    from model_loader.device import describe_device
    from model_loader.header import find_header
    from model_loader.memory import free_bytes
    from model_loader.names import read_name
    from model_loader.plan import parse_batches, plan_lines, plan_values
    from model_loader.precision import is_automatic, resolve_precision
    from model_loader.weights import fitting

    batches = parse_batches(arguments.batch)
    device = describe_device(settings.device)
    only = None if is_automatic(settings.precision) else resolve_precision(settings.precision)
    model = fitting(device)[0].name if read_name(settings.model).is_automatic else settings.model
    header = find_header(
        model,
        offline=settings.offline,
        token=settings.hf_token or None,
        mirror=settings.hub_mirror or None,
        cache_dir=settings.cache_dir,
    )
    free = free_bytes(device.torch_device)
    how: dict[str, Any] = {"engine": settings.engine, "batch": settings.batch_size, "only": only}
    if arguments.json:
        say(json.dumps(plan_values(header, device, free, batches, **how), ensure_ascii=False, indent=2))
    else:
        say("\n".join(plan_lines(header, device, free, batches, **how)))
    return 0
