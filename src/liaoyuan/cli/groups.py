"""Commands with many options, shown in groups on one screen, and groups of commands of which one is meant by itself."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class GroupedCommand(TyperCommand):
    """Shows options under the titles that their `rich_help_panel` names, in the order in which those first come."""

    def get_help(self, ctx: Any) -> str:
        """Return the help without empty lines, in place of which there is room for options."""
        return "\n".join(line for line in super().get_help(ctx).splitlines() if line)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class DefaultCommand(TyperGroup):
    """A group whose first command is meant where none is named: `liaoyuan data run.toml` is `data corpus run.toml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])
