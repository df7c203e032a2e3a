"""Which pairs to keep: curate is the way in. ingest reads tables (columns names them, text_tables
opens CSV and JSONL), presets/ list rules, engines run them (DuckDB, Spark, BigQuery), metaclip and
metadata_entries balance by concepts, report counts what went and why.
"""
