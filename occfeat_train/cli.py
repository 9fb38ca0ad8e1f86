"""The command line: occfeat-train check. Exit codes: 0 all is well, 1 an error, 2 wrong usage."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="occfeat")
def main() -> None:
    """Training bird's-eye-view networks from a cache of OccFeat targets."""


@main.command()
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache"), show_default=True,
              envvar="OCCFEAT_CACHE", help="Directory of caches; a split lies in CACHE/SPLIT.zarr.")  # fmt: skip
@click.option("--split", required=True, help="Split of the cache: train, val, mini_train, ...")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Random keyframes to read.")
def check(cache: Path, split: str, samples: int) -> None:
    """Say whether a cache is ready to be trained on: read random keyframes and sample their targets."""
    from occfeat_targets.reader import CacheReader
    from occfeat_train.check import check_cache

    try:
        reader = CacheReader(cache / f"{split}.zarr")
        click.echo("\n".join([*reader.cache.spec.describe(), *reader.cache.warnings]))
        click.echo("\n".join(check_cache(reader, samples).describe()))
    except (ValueError, OSError) as err:
        click.echo(f"error: {err}", err=True)
        sys.exit(1)
    click.echo(f"{reader.cache.path} is ready")
