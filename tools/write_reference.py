"""Write docs/reference/config.md and commands.md: every key of a config, and every option of a command.

    python tools/write_reference.py

They are read from the settings and the parsers themselves, and a test compares the pages with these.
"""

from pathlib import Path

from reference.commands_page import command_page
from reference.config_page import ConfigReference

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "config.md").write_text(ConfigReference().page(), encoding="utf-8")
    (REFERENCE / "commands.md").write_text(command_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
