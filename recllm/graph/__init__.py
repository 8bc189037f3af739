"""The knowledge graph: read, stored, asked, and written as text."""
