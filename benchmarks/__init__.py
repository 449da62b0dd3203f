"""This project and its peers side by side, interleaved in one run, with their results checked against one another."""
