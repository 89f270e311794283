"""One DICOM file: its header, whether it is a CT slice, and its stored values.

elements      the header values that are read, each declared once
header        the beginning of a file -> Header
accept        which headers are CT slices, and why others are not
decode        the stored values; compressed ones by pydicom, in a separate process that may crash
jpeg_plugin   pydicom plugin for imagecodecs
"""
