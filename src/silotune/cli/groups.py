"""A group of commands, one of which is meant where none is named."""

from __future__ import annotations

import click
from typer.core import TyperGroup


def with_default(name: str) -> type[TyperGroup]:
    """A group in which ``GROUP ARGUMENTS`` is ``GROUP name ARGUMENTS``."""

    class Group(TyperGroup):
        """Puts the command's name before arguments that name none."""

        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            return super().resolve_command(ctx, args if args[0] in self.commands else [name, *args])

    return Group
