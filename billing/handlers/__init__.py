"""One module per tag of the document, one function per operation: open a transaction, apply rules, reply."""
