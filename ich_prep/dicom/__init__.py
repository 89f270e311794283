"""One DICOM file: its header, whether it is a CT slice, and its stored values.

elements          the header values that are read, each declared once
skim              the beginning of a file -> its elements, fast
pydicom_header, slow_header    the same by pydicom, in a separate process that may crash
header            the beginning of a file -> Header
litter            which files that are not DICOM are no slices
accept            which headers are CT slices, and why others are not
decode            the stored values; compressed ones by a separate process that may crash
isolation         that process, seen from its parent
decoding_process  its main loop
shared_memory     the memory through which files and pixels pass between the two
frames            the frame in a compressed file, and the stored values in the frame
jpeg_plugin       JPEG, JPEG lossless and JPEG-LS by imagecodecs; also as pydicom plugin
"""
