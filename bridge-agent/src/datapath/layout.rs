//! Reads the layout of a map's keys and values from the type information that the map was made with, so that an agent
//! can read the maps of another version of bridge, older or newer.

/// Fields in the order in which they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    size: usize,
    fields: Vec<Field>,
}

/// Of a struct; the one field of anything else has no name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: String,
    offset: usize,
    size: usize,
}

impl Layout {
    /// Of type `id` in raw type information (Documentation/bpf/btf.rst); `None` if it cannot be understood.
    pub(super) fn of(btf: &[u8], id: u32) -> Option<Self> {
        Types::of(btf)?.layout(id)
    }

    /// Length in bytes.
    pub(super) const fn size(&self) -> usize {
        self.size
    }

    /// Converts `from` to this layout: fields of the same name are taken over, integers that have grown are extended
    /// (numbers in maps are in the byte order of the host, which is little-endian), new fields are zero.
    pub(super) fn convert(&self, from: &Self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut converted = vec![0; self.size];
        for field in &self.fields {
            let Some(old) = from.fields.iter().find(|old| old.name == field.name) else { continue };
            let size = old.size.min(field.size);
            let value = bytes.get(old.offset..old.offset + size)?;
            converted.get_mut(field.offset..field.offset + size)?.copy_from_slice(value);
        }
        Some(converted)
    }
}

/// Type information, taken apart.
struct Types<'a> {
    strings: &'a [u8],
    /// By id; id 0 is void.
    types: Vec<Type<'a>>,
}

#[derive(Clone, Copy)]
struct Type<'a> {
    kind: u32,
    /// Size in bytes, or the id of another type.
    size_or_type: u32,
    /// The rest, behind the common part.
    rest: &'a [u8],
}

impl<'a> Types<'a> {
    fn of(btf: &'a [u8]) -> Option<Self> {
        const MAGIC: u16 = 0xeb9f;
        if u16::from_ne_bytes(*btf.first_chunk()?) != MAGIC {
            return None;
        }
        let header = |index: usize| Some(word(btf, 4 + 4 * index)? as usize);
        let (length, types_at, types_length) = (header(0)?, header(1)?, header(2)?);
        let (strings_at, strings_length) = (header(3)?, header(4)?);
        let section = |at: usize, size: usize| btf.get(length.checked_add(at)?..)?.get(..size);
        let mut left = section(types_at, types_length)?;
        let mut types = vec![Type { kind: 0, size_or_type: 0, rest: &[] }];
        while !left.is_empty() {
            let info = word(left, 4)?;
            let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let rest = match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => members * 12,
                6 | 13 => members * 8,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            types.push(Type { kind, size_or_type: word(left, 8)?, rest: left.get(12..12 + rest)? });
            left = left.get(12 + rest..)?;
        }
        Some(Self { strings: section(strings_at, strings_length)?, types })
    }

    fn layout(&self, id: u32) -> Option<Layout> {
        const INT: u32 = 1;
        const STRUCT: u32 = 4;
        /// Typedefs and qualifiers refer to another type; a longer chain is an error.
        const MOST_ALIASES: usize = 16;
        let mut of = *self.types.get(id as usize)?;
        for _ in 0..MOST_ALIASES {
            if !matches!(of.kind, 8..=11 | 18) {
                break;
            }
            of = *self.types.get(of.size_or_type as usize)?;
        }
        let size = of.size_or_type as usize;
        match of.kind {
            INT => Some(Layout { size, fields: vec![Field { name: String::new(), offset: 0, size }] }),
            STRUCT => {
                let mut members = of
                    .rest
                    .chunks(12)
                    .map(|member| {
                        Some(((word(member, 8)? & 0xff_ffff) as usize / 8, self.string(word(member, 0)?)?))
                    })
                    .collect::<Option<Vec<_>>>()?;
                members.sort();
                // Padding is a field too, in every struct of the ABI: a field ends where the next begins.
                let ends =
                    members.iter().skip(1).map(|(offset, _)| *offset).chain([size]).collect::<Vec<_>>();
                let fields = members
                    .into_iter()
                    .zip(ends)
                    .map(|((offset, name), end)| Some(Field { name, offset, size: end.checked_sub(offset)? }))
                    .collect::<Option<_>>()?;
                Some(Layout { size, fields })
            }
            _ => None,
        }
    }

    fn string(&self, at: u32) -> Option<String> {
        let bytes = self.strings.get(at as usize..)?.split(|byte| *byte == 0).next()?;
        String::from_utf8(bytes.to_vec()).ok()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, fields: &[(&str, usize, usize)]) -> Layout {
        let field = |&(name, offset, size): &(&str, usize, usize)| Field { name: name.into(), offset, size };
        Layout { size, fields: fields.iter().map(field).collect() }
    }

    /// Type 1: u32; 2: struct { a: u32, b: u32 }; 3: a typedef of it.
    fn btf() -> Vec<u8> {
        let types: [u32; 4 + 3 + 3 + 3 + 3] =
            [0, 1 << 24, 4, 32, 0, 4 << 24 | 2, 8, 1, 1, 0, 3, 1, 32, 5, 8 << 24, 2];
        let strings = b"\0a\0b\0t\0\0";
        let header = [24, 0, 64, 64, 8];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in header.iter().chain(&types) {
            bytes.extend(word.to_ne_bytes());
        }
        [&bytes[..], strings].concat()
    }

    #[test]
    fn fields_are_found_by_name_and_place() {
        let both = layout(8, &[("a", 0, 4), ("b", 4, 4)]);
        assert_eq!(Layout::of(&btf(), 2), Some(both.clone()));
        assert_eq!(Layout::of(&btf(), 3), Some(both));
        assert_eq!(Layout::of(&btf(), 1), Some(layout(4, &[("", 0, 4)])));
        assert_eq!(Layout::of(&btf(), 4), None);
    }

    #[test]
    fn what_is_cut_off_is_not_understood() {
        let whole = btf();
        for length in 0..whole.len() - 4 {
            assert_eq!(Layout::of(&whole[..length], 2), None, "{length}");
        }
    }

    #[test]
    fn fields_may_move_grow_come_and_go() {
        let old = layout(8, &[("time", 0, 4), ("gone", 4, 2), ("state", 6, 2)]);
        let new = layout(16, &[("state", 0, 1), ("new", 1, 7), ("time", 8, 8)]);
        let converted = new.convert(&old, &[1, 2, 3, 4, 5, 6, 7, 0]);
        assert_eq!(converted, Some(vec![7, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]));
        assert_eq!(new.convert(&old, &[1, 2]), None);
    }
}
