"""The list as a page of the documentation."""

from microedit_vllm.engine.private_names import PRIVATE_NAMES, SUPPORTED


def table() -> str:
    """The list as Markdown, the whole of `docs/private_names.md`."""
    lines = [
        "# What we use of vLLM's insides",
        "",
        f"Made from `microedit_vllm/engine/private_names/` for vLLM {SUPPORTED}. At start the "
        "server compares this list with the vLLM that is installed, and refuses to serve edits "
        "where something is gone; `tests/microedit_vllm/engine/test_private_names.py` compares "
        "every parameter and lists all that changed.",
        "",
        "| vLLM's name | parameters, or attributes | our module | what for |",
        "|---|---|---|---|",
    ]
    for each in PRIVATE_NAMES:
        if each.parameters is None:
            details = ", ".join(f"`.{attribute}`" for attribute in each.attributes)
        else:
            details = f"`({', '.join(each.parameters)})`"
        users = ", ".join(f"`{user}`" for user in each.used_by.split())
        lines.append(f"| `{each.module}.{each.name}` | {details} | {users} | {each.purpose} |")
    return "\n".join(lines) + "\n"
