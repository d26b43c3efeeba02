//! What a completion or an answer is for, packed into 64 bits.

use mirror_net::engine::action::RequestToken;

/// What a completion of the ring belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Token {
    Wake,
    Disk(usize),
    LaneReceive(usize),
    LaneSend(usize),
    ClientReceive(usize),
    ClientSend(usize),
    Tag { export: usize, queue: u16, tag: u16 },
}

const KIND_SHIFT: u32 = 56;

fn pack(kind: u64, value: u64) -> u64 {
    debug_assert!(value < 1 << KIND_SHIFT);
    kind << KIND_SHIFT | value
}

fn tag_value(export: usize, queue: u16, tag: u16) -> u64 {
    (export as u64) << 32 | u64::from(queue) << 16 | u64::from(tag)
}

impl Token {
    pub fn encode(self) -> u64 {
        match self {
            Self::Wake => pack(0, 0),
            Self::Disk(index) => pack(1, index as u64),
            Self::LaneReceive(index) => pack(2, index as u64),
            Self::LaneSend(index) => pack(3, index as u64),
            Self::ClientReceive(index) => pack(4, index as u64),
            Self::ClientSend(index) => pack(5, index as u64),
            Self::Tag { export, queue, tag } => pack(6, tag_value(export, queue, tag)),
        }
    }

    pub fn decode(token: u64) -> Self {
        let value = token & ((1 << KIND_SHIFT) - 1);
        let index = value as usize;
        match token >> KIND_SHIFT {
            0 => Self::Wake,
            1 => Self::Disk(index),
            2 => Self::LaneReceive(index),
            3 => Self::LaneSend(index),
            4 => Self::ClientReceive(index),
            5 => Self::ClientSend(index),
            _ => Self::Tag { export: (value >> 32) as usize, queue: (value >> 16) as u16, tag: value as u16 },
        }
    }
}

/// Whose request it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Asker {
    Client { index: usize, slot: usize },
    Tag { export: usize, queue: u16, tag: u16 },
}

impl Asker {
    pub fn encode(self) -> RequestToken {
        RequestToken(match self {
            Self::Client { index, slot } => pack(0, (index as u64) << 16 | slot as u64),
            Self::Tag { export, queue, tag } => pack(1, tag_value(export, queue, tag)),
        })
    }

    pub fn decode(token: RequestToken) -> Self {
        let value = token.0 & ((1 << KIND_SHIFT) - 1);
        if token.0 >> KIND_SHIFT == 0 {
            Self::Client { index: (value >> 16) as usize, slot: usize::from(value as u16) }
        } else {
            Self::Tag { export: (value >> 32) as usize, queue: (value >> 16) as u16, tag: value as u16 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip() {
        let tokens = [
            Token::Wake,
            Token::Disk(7),
            Token::LaneReceive(1 << 30),
            Token::LaneSend(0),
            Token::ClientReceive(3),
            Token::ClientSend(4),
            Token::Tag { export: 5, queue: 65_535, tag: 4095 },
        ];
        for token in tokens {
            assert_eq!(Token::decode(token.encode()), token);
        }
        for asker in [Asker::Client { index: 9, slot: 1023 }, Asker::Tag { export: 1, queue: 2, tag: 3 }] {
            assert_eq!(Asker::decode(asker.encode()), asker);
        }
    }
}
