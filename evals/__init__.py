"""What eval_dba.py measures, a file a measurement. Functions take values and return values; each file's main functions
alone see the command line, print, and write the result."""
