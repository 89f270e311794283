"""One DICOM file: its header, whether it is a CT slice, and its stored values.

elements      the header values that are read, each declared once
skim          the beginning of a file -> its elements, fast
pydicom_header, slow_header    the same by pydicom, in a separate process that may crash
header        the beginning of a file -> Header
litter        which files that are not DICOM are no slices
accept        which headers are CT slices, and why others are not
decode        the stored values; compressed ones by pydicom, in a separate process that may crash
jpeg_plugin   pydicom plugin for imagecodecs
"""
