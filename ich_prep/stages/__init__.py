"""The stages of a build: tables and integers in, tables and shards out."""
