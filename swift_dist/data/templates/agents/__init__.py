"""How tools are written into conversations of models whose chat template does not know them.

A file holds one way as ``render(messages, tools) -> messages``: a pure function of text. Its messages have only the
roles system, user and assistant. Where a tool's result stands inside the assistant's turn, that message has ``parts``:
its content cut into (text, loss), where the loss is a number or None (as the loss scale says), and 0 for what a tool
said.
"""
