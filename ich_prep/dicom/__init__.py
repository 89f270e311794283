"""One DICOM file: its header, whether it is a CT slice, and its stored values.

header        the file's beginning -> Header; every data element that is read is declared there
accept        which headers are those of CT slices, and why the others are not
decode        the stored values, by pydicom where they are compressed, in a process that may die
jpeg_plugin   pydicom's door to imagecodecs
"""
