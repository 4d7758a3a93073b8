"""The page of a measurement: `report.html`, made of the template, style and script beside this file."""
