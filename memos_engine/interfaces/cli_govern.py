"""`memos-engine audit | grant | grants | revoke | history`: who may do what, and who did what. No model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from memos_engine.interfaces.cli_store import (
    DEFAULT_STORE,
    TENANT,
    AsOfOption,
    BranchOption,
    IdArgument,
    StoreHere,
    local,
    opened,
    optional_moment,
)
from memos_engine.interfaces.options import JsonOption, UserOption, console, emit, show_table

if TYPE_CHECKING:
    from memos_engine.memory.governance import Grant
    from memos_engine.memory.store_log import AuditEvent

audit_app = typer.Typer(help="The trail of all changes: check it, read it.", no_args_is_help=True)
IdOption = Annotated[
    str | None, typer.Option("--id", metavar="ID", help="This memory (at least its first 8 characters).")
]


def register(app: typer.Typer) -> None:
    """Put these commands beside the others."""
    app.add_typer(audit_app, name="audit")
    for command in (history, grant, grants, revoke):
        app.command()(command)


def history(
    cube_id: IdArgument,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    as_of: AsOfOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what happened to a memory."""
    with opened(store, user, branch) as here:
        found = here.store.history(here.principal, here.id(cube_id), as_of=optional_moment(as_of))
    if as_json:
        emit([entry.to_dict() for entry in found])
        return
    rows = [(local(e.at, exact=True), e.event, e.version, e.state, e.text or "(erased)") for e in found]
    show_table(["when", "event", "version", "state", "text"], rows, whole=("when",))


# -- the audit trail -----------------------------------------------------------------------------


@audit_app.command("verify")
def audit_verify(store: StoreHere = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Check the chain of the whole trail. Its head, kept elsewhere, also shows a trail written anew."""
    with opened(store) as here:
        count = here.store.audit_verify()
        seq, digest = here.store.audit_head()
    if as_json:
        emit({"sound": True, "events": count, "head": {"seq": seq, "hash": digest}})
    else:
        console.print(f"The trail of {count} events is whole; event {seq} has the hash {digest}.")


@audit_app.command("log")
def audit_log(
    context: typer.Context,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    branch: BranchOption = "",
    everybody: Annotated[bool, typer.Option("--all", help="Everybody's, for the store's operator.")] = False,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Not before; ISO 8601.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Not after; ISO 8601.")] = None,
    event: Annotated[str | None, typer.Option(help="Events of this name, such as added or granted.")] = None,
    id_: IdOption = None,
    limit: Annotated[int, typer.Option(help="The last so many.", min=1)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show what a user did, oldest first."""
    source = context.get_parameter_source("user")  # the environment may name a user all the same
    if everybody and (branch or (source is not None and source.name == "COMMANDLINE")):
        raise typer.BadParameter("give either --all, or --user and --branch")
    with opened(store, user, branch) as here:
        found = here.store.audit_log(
            None if everybody else here.principal,
            since=optional_moment(since),
            until=optional_moment(until),
            event=event,
            cube_id=None if id_ is None else id_ if everybody else here.id(id_),
            limit=limit,
        )
    if as_json:
        emit([one.to_dict() for one in found])
    elif not found:
        console.print("No event matches.")
    else:
        for one in found:
            who = (f"{one.user or '-':10}",) if everybody else ()
            cells = (local(one.at), *who, f"{one.event:14}", f"{one.cube_id or '-':36}", _details(one))
            console.print("  ".join(cells).rstrip())


def _details(one: AuditEvent) -> str:
    """What was written of an event beside its time, name, caller and memory."""
    shown = {"at", "event", "user", "tenant", "cube_id"} | ({"branch"} if one.cube_id else set())
    parts = []
    for name, value in one.details.items():
        if name == "grant" and isinstance(value, dict):
            whom = (value["grantee"] or {}).get("user", "everybody")
            value = f"{value['id']}: {value['effect']} {value['action']} to {whom}"
        if name not in shown:
            parts.append(f"{name} {value if isinstance(value, str) else json.dumps(value)}")
    return ", ".join(parts)


# -- grants --------------------------------------------------------------------------------------


def grant(
    action: Annotated[str, typer.Argument(help="read, write or share.")],
    to: Annotated[str | None, typer.Option("--to", metavar="USER", help="Who may.")] = None,
    everybody: Annotated[bool, typer.Option("--everybody", help="Every user may.")] = False,
    id_: IdOption = None,
    deny: Annotated[bool, typer.Option("--deny", help="May not, whatever else allows it.")] = False,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Ends then; ISO 8601.")] = None,
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let somebody do something with one of your memories (--id), or with all, later ones too."""
    from memos_engine.memory.governance import Principal

    if (to is None) != everybody:
        raise typer.BadParameter("give either --to USER or --everybody")
    with opened(store, user) as here:
        made = here.store.grant(
            here.principal,
            action,
            cube_id=None if id_ is None else here.id(id_),
            to=None if to is None else Principal(TENANT, to),
            effect="deny" if deny else "allow",
            expires_at=optional_moment(until),
        )
    if as_json:
        emit(made.to_dict())
        return
    console.print(_sentence(made))


def _sentence(made: Grant) -> str:
    who = "everybody" if made.grantee is None else made.grantee.user
    may = "may not" if made.effect == "deny" else "may"
    what = f"memory {made.cube_id}" if made.cube_id else "all memories"
    end = f" until {local(made.expires_at)}" if made.expires_at else ""
    return f"Grant {made.id}: {who} {may} {made.action} {what} of {made.owner.user}{end}."


def grants(
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    id_: IdOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the grants in force on your memories, and those that you gave."""
    with opened(store, user) as here:
        found = here.store.grants(here.principal, None if id_ is None else here.id(id_))
    if as_json:
        emit([one.to_dict() for one in found])
    elif not found:
        console.print("No grant.")
    else:
        for one in found:
            console.print(_sentence(one))


def revoke(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="As `grants` shows it.")],
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a grant, or a denial, back."""
    with opened(store, user) as here:
        gone = here.store.revoke(here.principal, number)
    emit(gone.to_dict()) if as_json else console.print(f"Revoked: grant {gone.id}.")
