"""Rows: what a fine-tuning file says, whatever format it is written in."""

from swift_dist.data.rows.base import BadRowError, Message, Row, RowFormat

__all__ = ["BadRowError", "Message", "Row", "RowFormat"]
