"""What `fedloge check` looks at, one module for each side and one for each thing both sides have."""
