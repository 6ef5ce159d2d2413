"""The terms of a distiller's loss, one file each."""
