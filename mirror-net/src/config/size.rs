//! Sizes as people write them.

/// Units, largest first: what `K`, `KiB`, `G`, `GiB` mean here is always a power of 1,024.
const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// Reads `64MiB`, `1G`, `512 K` or a plain number of bytes. `None` if it is none of these, is
/// zero, or does not fit.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let unit = unit.trim();
    let shift = if unit.is_empty() || unit == "B" {
        0
    } else {
        let (_, shift) = UNITS
            .iter()
            .find(|(name, _)| unit.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest == "iB"))?;
        *shift
    };
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

/// Writes a size so that [`parse_bytes`] reads it back exactly if it is a whole number of units;
/// otherwise with one decimal.
pub fn format_bytes(bytes: u64) -> String {
    for (name, shift) in UNITS {
        let unit = 1u64 << shift;
        if bytes >= unit {
            return if bytes.is_multiple_of(unit) {
                format!("{} {name}iB", bytes / unit)
            } else {
                format!("{:.1} {name}iB", bytes as f64 / unit as f64)
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_bytes("64MiB"), Some(64 << 20));
        assert_eq!(parse_bytes("1G"), Some(1 << 30));
        assert_eq!(parse_bytes(" 512 K "), Some(512 << 10));
        assert_eq!(parse_bytes("4096"), Some(4096));
        for wrong in ["", "G", "1.5G", "-1", "1GB", "1Gi", "0", "99999999999T", "1 Gib"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(format_bytes(64 << 20), "64 MiB");
        assert_eq!(format_bytes((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(format_bytes(100), "100 B");
        assert_eq!(parse_bytes(&format_bytes(3 << 40)), Some(3 << 40));
    }
}
