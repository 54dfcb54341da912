"""SAEs of this and other libraries, in and out."""
