"""Images in tables: Parquet files, and datasets of Hugging Face."""
