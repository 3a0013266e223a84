"""Where ranks begin, before any trainer."""
