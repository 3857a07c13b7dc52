"""`memos-engine cube`: memories as they are, were, and may become. No model is loaded."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from memos_engine.interfaces.cli_store import (
    DEFAULT_STORE,
    AsOfOption,
    BranchOption,
    IdArgument,
    Opened,
    StoreHere,
    local,
    moment,
    on_terminal,
    opened,
    optional_moment,
    standard_input,
)
from memos_engine.interfaces.options import JsonOption, UserOption, console, emit, show_table

if TYPE_CHECKING:
    from memos_engine.memory.cube import Fact, MemCube
    from memos_engine.memory.lifecycle import LifecycleState
    from memos_engine.memory.timemachine import Rollback, VersionDiff

cube_app = typer.Typer(
    help="Look at memories, change them, go back in time; check the store.", no_args_is_help=True
)
branch_app = typer.Typer(
    help="What-if branches: copies of your memories, to try things on.", no_args_is_help=True
)
cube_app.add_typer(branch_app, name="branch")

_STYLES = {"+": "green", "-": "red", "@": "cyan"}
IfVersion = Annotated[int | None, typer.Option(help="Only while this is its version.", min=1)]


# -- looking -------------------------------------------------------------------------------------


@cube_app.command("ls")
def ls(
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    state: Annotated[list[str] | None, typer.Option(help="In this state; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; repeated: with all of them.")] = None,
    as_of: AsOfOption = None,
    valid_at: Annotated[
        str | None, typer.Option("--valid-at", metavar="TIME", help="What is true at that time.")
    ] = None,
    own: Annotated[bool, typer.Option("--own", help="Without memories of others.")] = False,
    limit: Annotated[int | None, typer.Option(help="The newest so many.", min=1)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Archived ones, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List memories, the oldest first; without --all or --state those that requests can use."""
    if state and everything:
        raise typer.BadParameter("give either --state or --all")
    with opened(store, user, branch) as here:
        cubes = here.store.list(
            here.principal,
            states=_states(state, everything),
            as_of=optional_moment(as_of),
            valid_at=optional_moment(valid_at),
            own=own,
        )
    cubes = [cube for cube in cubes if set(tag or ()) <= set(cube.tags)]
    cubes = cubes if limit is None else cubes[-limit:]
    if as_json:
        emit([cube.to_dict() for cube in cubes])
    elif not cubes:
        console.print("No memory matches.")
    else:
        _table(cubes, here.principal.user)


def _states(given: Sequence[str] | None, everything: bool) -> frozenset[LifecycleState]:
    from memos_engine.memory.lifecycle import LIVE, LifecycleState

    shown = {state.value: state for state in LifecycleState if state is not LifecycleState.EXPIRED}
    if everything:
        return frozenset(shown.values())
    if not given:
        return LIVE
    unknown = [name for name in given if name not in shown]
    if unknown:
        raise typer.BadParameter(
            f"{unknown[0]!r} is none of {', '.join(shown)}; deleted ones show in `history` only",
            param_hint="--state",
        )
    return frozenset(shown[name] for name in given)


def _table(cubes: Sequence[MemCube], user: str) -> None:
    shared = any(cube.owner.user != user for cube in cubes)
    rows = []
    for cube in cubes:
        text = textwrap.shorten(cube.body or "(erased)", 160, placeholder="...")
        owner = (cube.owner.user,) if shared else ()
        rows.append((cube.id, *owner, cube.version, cube.state, text))
    show_table(["id", *(["owner"] if shared else []), "version", "state", "text"], rows, whole=("id",))


@cube_app.command("show")
def show(
    cube_id: IdArgument,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    as_of: AsOfOption = None,
    version: Annotated[
        int | None, typer.Option(help="As this version was when it was written.", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything about one memory."""
    if as_of is not None and version is not None:
        raise typer.BadParameter("give either --as-of or --version")
    with opened(store, user, branch) as here:
        one = here.id(cube_id)
        when = _written(here, one, version) if version is not None else optional_moment(as_of)
        cube = here.store.get(here.principal, one, as_of=when)
    if as_json:
        emit(cube.to_dict())
    else:
        _describe(cube)


def _written(here: Opened, cube_id: str, version: int) -> Any:
    from memos_engine.errors import MemoryInputError

    events = here.store.history(here.principal, cube_id)
    for event in events:
        if event.version == version:
            return event.at
    raise MemoryInputError(
        f"memory {cube_id!r} has no version {version}, the last one is {events[-1].version}; history shows "
        "them."
    )


def _describe(cube: MemCube) -> None:
    parent = f" (from {cube.parent})" if cube.parent else ""
    rows = {
        "id": cube.id,
        "owner": cube.owner.user,
        "state": cube.state.value,
        "version": f"{cube.version}{parent}",
        "created": local(cube.created_at),
        "changed": local(cube.updated_at),
        "origin": f"{cube.origin}, {cube.semantic_type}",
        "tags": ", ".join(cube.tags),
        "fact": _fact(cube.fact),
        "access": f"{cube.visibility}, {cube.sensitivity}",
        "priority": cube.priority or "",
        "expires": local(cube.ttl_at),
        "half-life": f"{cube.half_life_s:g} s" if cube.half_life_s else "",
        "uses": f"{cube.uses}, last {local(cube.last_used_at)}" if cube.uses else "0",
        "source gone": local(cube.source_gone_at),
    }
    for name, value in rows.items():
        if value != "":
            console.print(f"{name:12}{value}")
    console.print()
    console.print("(erased)" if cube.body is None else cube.body)


def _fact(fact: Fact | None) -> str:
    if fact is None:
        return ""
    named = f"{fact.attribute} of {fact.subject}" if fact.subject else "true"
    since = f" from {local(fact.valid_from)}" if fact.valid_from else ""
    return f"{named}{since}" + (f" to {local(fact.valid_to)}" if fact.valid_to else "")


@cube_app.command("diff")
def diff(
    cube_id: IdArgument,
    before: Annotated[str, typer.Argument(metavar="A", help="A version's number, or a time.")],
    after: Annotated[str, typer.Argument(metavar="B", help="A version's number, or a time.")],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show what changed between two versions of a memory."""
    with opened(store, user, branch) as here:
        marks = [
            int(mark) if mark.isdecimal() and len(mark) < 10 else moment(mark) for mark in (before, after)
        ]
        found = here.store.diff(here.principal, here.id(cube_id), *marks)
    emit(found.to_dict()) if as_json else _show_diff(found)


def _show_diff(found: VersionDiff) -> None:
    console.print(Text(f"--- {found.cube_id} version {found.before}", "bold"))
    console.print(Text(f"+++ {found.cube_id} version {found.after}", "bold"))
    for line in found.lines:
        console.print(Text(line, _STYLES.get(line[:1], "")))
    tags = [*((f"-tag {tag}") for tag in found.tags_removed), *(f"+tag {tag}" for tag in found.tags_added)]
    facts = [found.fact_before, found.fact_after] if found.fact_before != found.fact_after else [None, None]
    named = [f"{sign}fact {_fact(fact)}" for sign, fact in zip("-+", facts, strict=True) if fact is not None]
    for line in (*tags, *named):
        console.print(Text(line, _STYLES[line[0]]))
    if found.same:
        console.print("The versions say the same.")


# -- changing ------------------------------------------------------------------------------------


@cube_app.command("update")
def update(
    cube_id: IdArgument,
    text: Annotated[str, typer.Argument(help="The text; - reads standard input.")],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    mode: Annotated[str, typer.Option(help="overwrite, append (a line) or merge (lines not there yet).")] = (
        "overwrite"
    ),
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    if_version: IfVersion = None,
    as_json: JsonOption = False,
) -> None:
    """Give a memory a new version; those before it are kept."""
    text = standard_input() if text == "-" else text
    with opened(store, user, branch) as here:
        cube = here.store.update(
            here.principal, here.id(cube_id), text, mode=mode, tags=tag, if_version=if_version
        )
    _say(cube, f"Updated: {cube.id} is at version {cube.version}.", as_json)


def _say(cube: MemCube, sentence: str, as_json: bool) -> None:
    emit(cube.to_dict()) if as_json else console.print(sentence)


def _register(verb: str, done: str, summary: str) -> None:
    """One command per move of the lifecycle: they differ in their names only."""

    def command(
        cube_id: IdArgument,
        store: StoreHere = DEFAULT_STORE,
        user: UserOption = None,
        branch: BranchOption = "",
        as_json: JsonOption = False,
    ) -> None:
        with opened(store, user, branch) as here:
            cube = getattr(here.store, verb)(here.principal, here.id(cube_id))
        _say(cube, f"{done}: {cube.id}", as_json)

    command.__doc__ = summary
    cube_app.command(verb)(command)


for _verb, _done, _summary in (
    ("freeze", "Frozen", "Close a memory to changes; it stays in use."),
    ("unfreeze", "Unfrozen", "Open a frozen memory to changes."),
    ("archive", "Archived", "Put a memory away: kept, but offered to no request."),
    ("restore", "Restored", "Bring an archived memory back."),
):
    _register(_verb, _done, _summary)


@cube_app.command("rollback")
def rollback(
    cube_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One memory, with VERSION.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version to make the present one.", min=1)] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="Take all your memories back to this time.")
    ] = None,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    if_version: IfVersion = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Go back: one memory to a version of it, or everything to a time. Nothing is lost: it can be undone."""
    one = cube_id is not None and version is not None and to is None
    if not one and (to is None or cube_id is not None or if_version is not None):
        raise typer.BadParameter("give ID and VERSION, or --to TIME alone")
    with opened(store, user, branch) as here:
        if to is not None:
            _rollback_all(here, to, yes or as_json, dry_run, as_json)
            return
        assert cube_id is not None
        assert version is not None
        found = here.id(cube_id)
        if dry_run:
            now = here.store.get(here.principal, found).version
            changes = here.store.diff(here.principal, found, now, version)
            emit(changes.to_dict()) if as_json else _show_diff(changes)
            return
        cube = here.store.rollback(here.principal, found, version, if_version=if_version)
    sentence = f"Rolled back: {cube.id} is at version {cube.version}, with what version {version} said."
    _say(cube, sentence, as_json)


def _rollback_all(here: Opened, to: str, yes: bool, dry_run: bool, as_json: bool) -> None:
    when = moment(to)
    ask = not yes and not dry_run and on_terminal()
    if dry_run or ask:
        would = here.store.rollback_to(here.principal, when, dry_run=True)
        if dry_run:
            emit(would.to_dict()) if as_json else _show_rollback(would, "would be ")
            return
        _show_rollback(would, "will be ")
        typer.confirm("Go back?", abort=True, err=True)
    did = here.store.rollback_to(here.principal, when)
    emit(did.to_dict()) if as_json else _show_rollback(did, "")


def _show_rollback(found: Rollback, verb: str) -> None:
    groups = (("taken back", found.restored), ("archived", found.put_away), ("deleted again", found.ended))
    if not any(ids for _, ids in groups):
        console.print(f"Nothing differs from {local(found.moment, exact=True)}.")
    for name, ids in groups:
        if ids:
            console.print(f"{verb}{name}: {', '.join(ids)}".capitalize())


# -- branches ------------------------------------------------------------------------------------


@branch_app.command("make")
def branch_make(
    name: Annotated[str, typer.Argument(help="A lower-case word.")],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy your memories into a branch; `cube ... --branch NAME` works in it."""
    with opened(store, user) as here:
        scope = here.store.branch(here.principal, name)
        count = len(here.store.list(scope))
    emit({"branch": name, "memories": count}) if as_json else console.print(
        f"Branch {name} begins with {count} memories."
    )


@branch_app.command("ls")
def branch_ls(store: StoreHere = DEFAULT_STORE, user: UserOption = None, as_json: JsonOption = False) -> None:
    """List your branches, dropped ones too."""
    with opened(store, user) as here:
        found = here.store.branches(here.principal)
    if as_json:
        emit([branch.to_dict() for branch in found])
    elif not found:
        console.print("No branch.")
    else:
        rows = [(b.name, local(b.at), local(b.dropped_at)) for b in found]
        show_table(["name", "made", "dropped"], rows)


@branch_app.command("drop")
def branch_drop(
    name: Annotated[str, typer.Argument()],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a branch with the memories in it; the originals stay."""
    with opened(store, user) as here:
        count = here.store.drop_branch(here.principal, name)
    emit({"dropped": name, "memories": count}) if as_json else console.print(
        f"Dropped branch {name} with {count} memories."
    )
