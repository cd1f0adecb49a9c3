"""Tools outside the package: large files in parts, GGUF files without the gguf package."""
