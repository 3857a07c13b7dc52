"""`memos-engine adapter`: parameter memory. Only `import` loads a model; `verify` and `export` read
tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memos_engine.interfaces.cli_store import DEFAULT_STORE, StoreHere, local, opened, user_name
from memos_engine.interfaces.options import (
    JsonOption,
    ModelOption,
    StoreOption,
    UserOption,
    console,
    emit,
    notes,
    show_table,
)

if TYPE_CHECKING:
    from memos_engine.memory.adapters import AdapterVersion

adapter_app = typer.Typer(
    help="Adapters (LoRA): take them in, look at them, go back to earlier ones.", no_args_is_help=True
)
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A name, an id, or its first 8 characters.")
]
VersionOption = Annotated[int | None, typer.Option("--version", help="This one, not the current one.", min=1)]


@adapter_app.command("ls")
def ls(
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    everything: Annotated[bool, typer.Option("--all", help="All versions, revoked ones too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List adapters in use."""
    with opened(store, user) as here:
        found = here.store.adapters(here.principal, everything=everything)
    if as_json:
        emit([one.to_dict() for one in found])
    elif not found:
        console.print("No adapter is in use." if not everything else "No adapter.")
    else:
        _table(found)


def _table(found: Sequence[AdapterVersion]) -> None:
    rows = []
    for one in found:
        size = f"r{one.rank}, {one.nbytes / 1e6:.1f} MB"
        note = one.stale or one.revoked_why or ""
        rows.append((one.cube_id, one.name or "(erased)", one.version, one.state, size, note))
    show_table(["id", "name", "v", "state", "size", "note"], rows, whole=("id", "name", "v", "state"))


@adapter_app.command("show")
def show(
    name: NameArgument,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    version: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's versions, and everything about one of them."""
    with opened(store, user) as here:
        every = _versions(here, name)
        found = _pick(every, name, version)
    if as_json:
        emit({**found.to_dict(), "versions": [{"version": v.version, "state": v.state} for v in every]})
        return
    rows = {
        "id": found.cube_id,
        "name": found.name or "(erased)",
        "version": f"{found.version} of {', '.join(f'{v.version} ({v.state})' for v in every)}",
        "digest": found.digest,
        "model": found.model,
        "rank": found.rank,
        "bytes": f"{found.nbytes:,}",
        "KV differs": "nowhere" if found.kv_floor is None else f"from layer {found.kv_floor} on",
        "made": f"{local(found.at)}, {found.how}",
        "promoted": local(found.promoted_at),
        "revoked": f"{local(found.revoked_at)}: {found.revoked_why}" if found.revoked_at else "",
        "sources": ", ".join(f"{one} version {v}" for one, v in found.sources),
        "note": found.stale,
    }
    for key, value in rows.items():
        if value != "":
            console.print(f"{key:12}{value}")
    if found.report:
        console.print()
        for key, value in found.report.items():
            console.print(f"{key:12}{value}")


def _versions(here: Any, name: str) -> list[AdapterVersion]:
    """All versions of the adapter of this name or id, also where none is in use."""
    from memos_engine.errors import MemoryNotFoundError

    every: list[AdapterVersion] = here.store.adapters(here.principal, everything=True)
    found = [v for v in every if name in (v.name, v.cube_id)]
    found = found or [v for v in every if len(name) >= 8 and v.cube_id.startswith(name)]
    ids = {v.cube_id for v in found if v.revoked_at is None} or {v.cube_id for v in found}
    if len(ids) != 1:
        raise MemoryNotFoundError(
            f"{len(ids)} adapters are called {name!r}; `adapter ls --all` shows the ids."
        )
    return [v for v in found if v.cube_id in ids]


def _pick(every: Sequence[AdapterVersion], name: str, version: int | None) -> AdapterVersion:
    from memos_engine.errors import MemoryNotFoundError

    for one in every:
        if one.version == version if version is not None else one.current:
            return one
    if version is None:
        return every[-1]
    raise MemoryNotFoundError(f"adapter {name!r} has versions 1 to {every[-1].version}, not {version}.")


@adapter_app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained() wrote.")],
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    name: Annotated[str | None, typer.Option(help="Your name for it (default: the folder's).")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Id of a memory that it was trained on; may be repeated.")
    ] = None,
    no_promote: Annotated[
        bool, typer.Option("--no-promote", help="Store it, but do not use it yet.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take in a PEFT adapter for a model, as a new version where there is one of that name."""
    from memos_engine.api import MemoryEngine

    with notes.status("opening the model"), MemoryEngine.open(model, store) as engine:
        person = engine.user(user_name(user))
        ids = [engine.opened_store.find_id(person.principal, one) for one in source or ()]
        found = person.adapters.import_(folder, name, sources=ids, promote=not no_promote)
    _say(found, f"{found.name} version {found.version} is {found.state}: {found.cube_id}", as_json)


@adapter_app.command("export")
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    version: VersionOption = None,
    model: Annotated[
        str | None, typer.Option(help="The model; only one with fused projections needs it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as PEFT reads it."""
    from memos_engine.decoder.adapter_file import export_peft
    from memos_engine.decoder.spec import ModelSpec
    from memos_engine.models import resolve
    from memos_engine.parameter import read_adapter

    with opened(store, user) as here:
        found = _pick(_versions(here, name), name, version)
        spec = None if model is None else ModelSpec.from_folder(resolve(model))
        export_peft(read_adapter(here.store, found), folder, spec, model or "")
    data = {"path": str(folder), "digest": found.digest, "version": found.version}
    emit(data) if as_json else console.print(f"{found.name} version {found.version}: {folder}")


@adapter_app.command("verify")
def verify(store: StoreHere = DEFAULT_STORE, user: UserOption = None, as_json: JsonOption = False) -> None:
    """Read every stored version in full. Exits with 1 when one is damaged."""
    from memos_engine.parameter import verify_adapters

    with opened(store, user) as here, notes.status("reading"):
        found = verify_adapters(here.store, here.principal)
    if as_json:
        rows = [
            {"id": one.cube_id, "version": one.version, "digest": one.digest, "sound": not why, "why": why}
            for one, why in found
        ]
        emit(rows)
    else:
        show_table(
            ["id", "name", "version", "result"],
            [(one.cube_id, one.name, one.version, why or "sound") for one, why in found],
            whole=("id",),
        )
    if any(why for _, why in found):
        raise typer.Exit(1)


@adapter_app.command("rollback")
def rollback(
    name: NameArgument,
    version: Annotated[
        int | None, typer.Argument(help="A version (default: the one used before).", min=1)
    ] = None,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Use an earlier version again. Nothing is lost: it can be undone in the same way."""
    with opened(store, user) as here:
        cube_id = _versions(here, name)[0].cube_id
        found = here.store.rollback_adapter(here.principal, cube_id, version)
    _say(found, f"{found.name} is at version {found.version} again.", as_json)


@adapter_app.command("promote")
def promote(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="A stored version that passed its gates.", min=1)],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Use a stored version from now on."""
    with opened(store, user) as here:
        cube_id = _versions(here, name)[0].cube_id
        found = here.store.promote_adapter(here.principal, cube_id, version)
    _say(found, f"{found.name} is at version {found.version}.", as_json)


@adapter_app.command("rm")
def rm(
    name: NameArgument,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    erase: Annotated[bool, typer.Option("--erase", help="Its name and reports, too, for good.")] = False,
    as_json: JsonOption = False,
) -> None:
    """End an adapter with all its versions; the files are removed."""
    with opened(store, user) as here:
        cube_id = _versions(here, name)[0].cube_id
        (here.store.erase if erase else here.store.delete)(here.principal, cube_id)
    data = {"id": cube_id, "erased": erase}
    emit(data) if as_json else console.print(f"{'Erased' if erase else 'Deleted'}: {cube_id}")


def _say(found: AdapterVersion, sentence: str, as_json: bool) -> None:
    emit(found.to_dict()) if as_json else console.print(sentence)
