"""What is looked up and not read: files, formats, records, command lines. The story stands one folder up."""
