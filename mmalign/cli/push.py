"""Upload a finished run to the Hugging Face Hub: its weights, model card, config and metrics.

Checkpoints, caches, data and what trackers wrote stay. Log in before, with `hf auth login` or by HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="output of a finished training")
    parser.add_argument("repo", metavar="REPO", help="organisation/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; made if it is not there")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, with sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Upload, or list what would be, and say where it lies."""
    from mmalign.training.push import check_repo, files_to_push, push

    if args.dry_run:
        files = files_to_push(args.folder)
        check_repo(args.repo)
        sizes = {file: (args.folder / file).stat().st_size for file in files}
        for file, size in sizes.items():
            print(f"{size:>14,}  {file}")
        print(f"{sum(sizes.values()):>14,}  {len(files)} files would go to {args.repo}; nothing was uploaded")
        return 0
    address = push(args.folder, args.repo, private=args.private, revision=args.revision, message=args.message)
    print(f"{args.folder} is at {address}")
    return 0
