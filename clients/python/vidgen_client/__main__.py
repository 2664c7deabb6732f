"""`vidgen-mcp` and `python -m vidgen_client`: start the MCP server."""

import sys


def main() -> None:
    try:
        import typer

        from vidgen_client.mcp_command import mcp
    except ModuleNotFoundError as error:
        sys.exit(f"vidgen-mcp needs the package {error.name}. Install it with: pip install 'vidgen-client[mcp]'")
    typer.run(mcp)


if __name__ == "__main__":
    main()
