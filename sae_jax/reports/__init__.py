"""Plain data in; tables, pictures and pages out."""
