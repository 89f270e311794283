"""What a build runs through: tables and integers in, tables and shards out."""
