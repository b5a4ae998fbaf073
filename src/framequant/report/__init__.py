"""What people see of a run: model card, tables, pages; made from the report alone."""
