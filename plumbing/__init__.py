"""What is looked up, not read: files, formats, command lines. The story stands one folder up."""
