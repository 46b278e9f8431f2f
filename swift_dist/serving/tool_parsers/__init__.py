"""How a family writes calls of tools into its text: one way a file, found by its name (``--tool_call_parser hermes``).

The names are vLLM's, so that one option means the same with every engine. A file holds one `PARSER`, a factory of
`base.ToolParser` that is given the tools' parameter schemas by name.
"""
