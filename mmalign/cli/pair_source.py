"""Options of the verbs that read preference pairs from any source."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mmalign.cli.generate import positive
from mmalign.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mmalign.config.sections import DataConfig


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how a source of pairs is read."""
    parser.add_argument(
        "--columns",
        metavar="KEY=NAME,...",
        help="which columns hold what, as in data.columns: prompt=text,chosen=good,rejected=bad",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N pairs, or images")
    parser.add_argument("--prompt", metavar="TEXT", help="prompt of images in folders and tars that have none")


def read_source(args: argparse.Namespace, **options: Any) -> DataConfig:
    """Return the data section of a config that these options stand for; `options` are further keys.

    Raises:
        UserError: an unknown key, or columns that make no pair.
    """
    from pydantic import ValidationError

    from mmalign.config.sections import ColumnsConfig, DataConfig

    columns: dict[str, str] = {}
    for part in (args.columns or "").split(",") if args.columns is not None else []:
        key, equals, name = (text.strip() for text in part.partition("="))
        if not equals or not name or key not in ColumnsConfig.model_fields:
            known = ", ".join(ColumnsConfig.model_fields)
            raise UserError(
                f"--columns '{part}': write KEY=NAME for one of {known}{did_you_mean(key, ColumnsConfig.model_fields)}"
            )
        columns[key] = name
    try:
        told = ColumnsConfig(**columns) if columns else None
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--columns {args.columns}: {reason}") from None
    return DataConfig(columns=told, limit=args.limit, default_prompt=args.prompt, **options)
