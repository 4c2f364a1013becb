"""Formats what others found: tables, a page, annotations. Takes data in, gives text back; measures nothing."""
