"""The commands of `starweave-image models`: list, fetch, check and delete the models on the disk."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from ..errors import ImageError
from ..weights import disk, hub, integrity
from ..weights.catalog import ModelCard, shipped
from ..weights.disk import Snapshot
from ..weights.find import cached, embedded_folder
from ..weights.hub import File, Plan, shown_bytes
from . import exits

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", 1)}


def run(args: argparse.Namespace) -> int:
    """Run the command that `args.action` names; returns the exit code."""
    # Set before the hub's client is imported, which reads the variable only once.
    if getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Errors are printed as messages, so the log need not show them too.
    logging.getLogger("starweave_image").addHandler(logging.NullHandler())
    if args.attached:
        threading.Thread(target=_end_with_input, daemon=True).start()
    actions = {
        "list": _list,
        "pull": _pull,
        "verify": _verify,
        "accept": _accept,
        "rm": _remove,
        "prune": _prune,
    }
    try:
        return actions[args.action](args)
    except ImageError as error:
        print(f"starweave-image: {error.message}", file=sys.stderr)
        return exits.code_of(error.kind)
    except KeyboardInterrupt:
        return exits.INTERRUPTED


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(exits.INTERRUPTED)


# list


def _list(args: argparse.Namespace) -> int:
    snapshots = disk.snapshots()
    rows = [*_packaged(), *map(_own, args.local), *map(_cached, reversed(snapshots))]
    if args.json:
        print(msgspec.json.encode(rows).decode())
        return exits.OK
    table = [("ID", "REVISION", "SIZE", "LAST USE", "STATE", "LICENCE")]
    for row in rows:
        state = row["state"] + (", in use" if row["in_use"] else "")
        revision, used = (row["revision"] or "-")[:12], (row["last_used"] or "-")[:10]
        table.append((row["id"], revision, shown_bytes(row["bytes"]), used, state, row["licence"]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    started = disk.partials(snapshots)
    total = f"{shown_bytes(disk.taken(snapshots))} in the cache"
    print(f"{total}, and {shown_bytes(sum(started.values()))} of broken downloads" if started else total)
    return exits.OK


def _row(id: str, state: str, folder: Path, card: ModelCard | None, **fields: Any) -> dict[str, Any]:
    row = {
        "id": id,
        "revision": None,
        "state": state,
        "bytes": 0,
        "last_used": None,
        "in_use": False,
        "licence": card.licence if card else disk.licence_in(folder),
        "known": card is not None,
        "folder": str(folder),
    }
    return row | fields


def _packaged() -> list[dict[str, Any]]:
    placed = [(card, embedded_folder(card.id)) for card in shipped() if card.source == "embedded"]
    return [_row(card.id, "embedded", folder, card, bytes=_bytes(folder)) for card, folder in placed]


def _own(named: str) -> dict[str, Any]:
    id, _, path = named.partition("=")
    folder = Path(path).expanduser().absolute()
    if not path or not folder.is_dir():
        raise ImageError("invalid_request", f"local must be ID=FOLDER with a folder that exists, got {named}")
    return _row(id, "local", folder, None, bytes=_bytes(folder))


def _cached(snapshot: Snapshot) -> dict[str, Any]:
    return _row(
        snapshot.repository,
        "complete" if snapshot.complete else "incomplete",
        snapshot.folder,
        disk.known(snapshot.repository),
        revision=snapshot.revision,
        bytes=snapshot.bytes,
        last_used=datetime.fromtimestamp(snapshot.used, timezone.utc).isoformat(timespec="seconds"),
        in_use=snapshot.in_use,
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# pull


def _pull(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import is_offline_mode

    card = disk.known(args.model)
    if card is not None and card.source == "embedded":
        print(f"{card.id} is part of the package")
        return exits.OK
    repository = card.source if card else args.model
    revision = args.revision or (card.revision if card else None)
    if is_offline_mode():
        return _pull_offline(repository, revision)
    plan = hub.plan(repository, revision)
    if not args.shown:
        _show(plan, card)
    if args.dry_run:
        return exits.CONSENT if plan.missing else exits.OK
    if plan.missing and not args.yes and not _agreed(plan):
        return exits.CONSENT
    # Needed even if nothing is missing: a branch or tag may now name another commit.
    with _Progress(plan) as progress:
        folder = hub.fetch(plan, report=progress.report)
    print(f"{plan.repository} is here, revision {folder.name}")
    return exits.OK


def _pull_offline(repository: str, revision: str | None) -> int:
    source = cached(sorted(disk.names(repository)), revision)
    if source is not None:
        print(
            f"{repository} is here, revision {source.revision}; offline mode forbids to look for a newer one"
        )
        return exits.OK
    part = "the rest of it" if disk.snapshots(repository, revision) else "it"
    raise ImageError(
        "model_load_failed", f"{repository} is not all here, and offline mode forbids to fetch {part}"
    )


def _show(plan: Plan, card: ModelCard | None) -> None:
    licence = plan.licence if plan.licence != "unknown" or card is None else card.licence
    print(f"{plan.repository} at revision {plan.revision}")
    print(f"  licence   {licence}")
    print(f"  gated     {'yes, and you have access' if plan.gated else 'no'}")
    print(f"  size      {shown_bytes(plan.bytes)} in {len(plan.files)} files")
    print(f"  to fetch  {shown_bytes(plan.bytes_missing)} in {len(plan.missing)} files")
    print(f"  disk      {shown_bytes(hub.free_bytes(plan.folder))} free", flush=True)


def _agreed(plan: Plan) -> bool:
    if not sys.stdin.isatty():
        print("starweave-image: nothing is fetched without consent: repeat it with --yes", file=sys.stderr)
        return False
    print(
        f"Fetch {shown_bytes(plan.bytes_missing)} under this licence? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class _Progress:
    """On a terminal one line that is redrawn, elsewhere a new line for each tenth."""

    def __init__(self, plan: Plan) -> None:
        missing = plan.missing
        self._here = {file.name: file.size for file in plan.files if file not in missing}
        self._total = max(plan.bytes, 1)
        here = sum(self._here.values())
        self._tenth = here * 10 // self._total
        self._line = tqdm(
            total=self._total, initial=here, unit="B", unit_scale=True, disable=None, leave=False
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def report(self, file: File, size: int) -> None:
        self._here[file.name] = size
        done = sum(self._here.values())
        self._line.update(done - self._line.n)
        if self._line.disable and (tenth := done * 10 // self._total) > self._tenth:
            self._tenth = tenth
            line = f"{done * 100 // self._total} %, {shown_bytes(done)} of {shown_bytes(self._total)}"
            print(line, file=sys.stderr, flush=True)


# verify


def _verify(args: argparse.Namespace) -> int:
    intact = True
    chosen = _chosen(args)
    if not chosen:
        print("There are no models in the cache")
    for snapshot in chosen:
        reading = f"Reading {snapshot.repository}, {shown_bytes(snapshot.bytes)}"
        with tqdm(desc=reading, bar_format="{desc}", disable=None, leave=False):
            damages = disk.verify(snapshot)
        name = f"{snapshot.repository} {snapshot.revision[:12]}"
        for damage in damages:
            print(f"{name}: {damage.name} is {damage.state}")
        bad = {damage.name for damage in damages if damage.state != "unchecked"}
        if args.repair and (bad or not snapshot.complete):
            plan = hub.plan(snapshot.repository, snapshot.revision)
            with _Progress(plan) as progress:
                hub.fetch(plan, again=bad, report=progress.report)
            # What remains are files that other tools fetched and this library does not use.
            bad -= {file.name for file in plan.files}
            print(f"{name}: repaired" + (f", except {', '.join(sorted(bad))}" if bad else ""))
        elif not snapshot.complete:
            print(f"{name}: incomplete; `pull` or `--repair` fetches the rest")
        elif not damages:
            print(f"{name}: intact")
        intact = intact and not bad and (snapshot.complete or args.repair)
    return exits.OK if intact else exits.FAILED


def _accept(args: argparse.Namespace) -> int:
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise ImageError("invalid_request", "accept takes a folder that exists", "folder")
    count = integrity.forget(folder)
    print(f"{count} weight files of {folder.name} are taken as they are when they are next loaded")
    return exits.OK


def _chosen(args: argparse.Namespace) -> list[Snapshot]:
    """The snapshots that the command line names; raises `model_not_found` if the named one is not on the disk."""
    chosen = disk.snapshots(args.model, args.revision)
    if args.model and not chosen:
        revision = f" in revision {args.revision}" if args.revision else ""
        raise ImageError("model_not_found", f"{args.model} is not in the cache{revision}", "model")
    return chosen


# rm and prune


def _remove(args: argparse.Namespace) -> int:
    for snapshot in _chosen(args):
        disk.remove(snapshot)
        print(f"Deleted {snapshot.repository} {snapshot.revision[:12]}")
    return exits.OK


def _prune(args: argparse.Namespace) -> int:
    quota = _size(args.quota)
    verb = "Would delete" if args.dry_run else "Deleted"
    pruning = disk.prune(quota, args.keep, args.dry_run)
    if pruning.partials:
        print(f"{verb} {len(pruning.partials)} beginnings of abandoned downloads")
    for snapshot in pruning.snapshots:
        used = datetime.fromtimestamp(snapshot.used, timezone.utc).date()
        print(f"{verb} {snapshot.repository} {snapshot.revision[:12]}, last used {used}")
    print(f"{shown_bytes(pruning.before)} before, {shown_bytes(pruning.after)} after")
    if pruning.after > quota:
        print("starweave-image: more than the quota stays, in use or to be kept", file=sys.stderr)
        return exits.FAILED
    return exits.OK


def _size(text: str) -> int:
    """The number of bytes in a size such as 500, 40GB, 1.5 TB or 8GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None:
        raise ImageError(
            "invalid_request", f"quota must be a size such as 40GB or 500MB, got {text}", "quota"
        )
    return int(float(match[1]) * _UNITS[match[2] or ""])
