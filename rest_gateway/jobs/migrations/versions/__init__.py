"""One module per step. A step that was released is never changed; SQLite needs `op.batch_alter_table` to alter."""
