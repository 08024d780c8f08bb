"""One module a tag of the document, one function an operation: open, ask, answer."""
