"""Search in a vector index that is bound to its model: text, image, and image +- text.

index.py keeps rows in Milvus; rows.py says what a row may be; filters.py and compose.py make
queries; ingest.py fills an index; recall.py measures it; sheet.py draws what was found.
"""
