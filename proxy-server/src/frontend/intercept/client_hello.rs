//! The server name of a TLS ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3), read from the bytes of the
//! connection so far. Pure: it takes a prefix of the stream and never looks beyond it.
//!
//! The message may be spread over several records (RFC 8446 section 5.1), and a record over several segments. Nothing
//! else of the message is judged than what has to be passed on the way to the name: that is the node's business.

use super::flight::{MAX, Malformed};

/// Content type of a record.
const HANDSHAKE: u8 = 22;
/// Largest plaintext of a record, RFC 8446 section 5.1.
const MAX_FRAGMENT: usize = 1 << 14;
/// Type and length of a handshake message.
const HEAD: usize = 4;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// `None`: the message is not whole yet. Else the name in it, if there is one.
pub(super) fn server_name(bytes: &[u8]) -> Result<Option<Option<String>>, Malformed> {
    let Some(message) = message(bytes)? else {
        return Ok(None);
    };
    extensions(&message)
        .and_then(name)
        .map(Some)
        .ok_or(Malformed::Tls)
}

/// The body of the ClientHello, once it is whole. Records behind it, such as early data, are not looked at.
fn message(bytes: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let mut fragments = Vec::new();
    let mut held: usize = 0;
    let mut rest = Bytes(bytes);
    while !rest.0.is_empty() {
        // A part of a record's head is judged too, so that what is no TLS need not be waited for.
        if rest.u8().is_some_and(|kind| kind != HANDSHAKE)
            || rest.u8().is_some_and(|major| major != 3)
        {
            return Err(Malformed::Tls);
        }
        let (Some(_minor), Some(length)) = (rest.u8(), rest.u16()) else {
            break;
        };
        let length = usize::from(length);
        // RFC 8446 section 5.1: no empty fragments of handshakes.
        if length == 0 || length > MAX_FRAGMENT {
            return Err(Malformed::Tls);
        }
        let fragment = rest.take(length.min(rest.0.len())).unwrap_or_default();
        held += fragment.len();
        fragments.push(fragment);
        let joined = || fragments.iter().copied().flatten().copied();
        if let Some(wanted) = length_of(joined())?
            && held >= HEAD + wanted
        {
            return Ok(Some(joined().skip(HEAD).take(wanted).collect()));
        }
    }
    Ok(None)
}

/// The length that the message claims, once its head is there.
fn length_of(mut message: impl Iterator<Item = u8>) -> Result<Option<usize>, Malformed> {
    if message.next().is_some_and(|kind| kind != CLIENT_HELLO) {
        return Err(Malformed::Tls);
    }
    let (Some(a), Some(b), Some(c)) = (message.next(), message.next(), message.next()) else {
        return Ok(None);
    };
    let length = (usize::from(a) << 16) | (usize::from(b) << 8) | usize::from(c);
    if length > MAX {
        return Err(Malformed::TooLarge);
    }
    Ok(Some(length))
}

/// The extensions; none at all is an empty list (RFC 5246 section 7.4.1.2).
fn extensions(message: &[u8]) -> Option<Bytes<'_>> {
    let mut body = Bytes(message);
    body.take(2 + 32)?; // version, random
    body.vec8()?; // session id
    body.vec16()?; // cipher suites
    body.vec8()?; // compression methods
    if body.0.is_empty() {
        return Some(body);
    }
    let extensions = body.vec16()?;
    body.0.is_empty().then_some(Bytes(extensions))
}

/// `None`: malformed. A name that is no text counts as none.
fn name(mut extensions: Bytes<'_>) -> Option<Option<String>> {
    let mut found = None;
    let mut seen = false;
    while !extensions.0.is_empty() {
        let (kind, body) = (extensions.u16()?, extensions.vec16()?);
        if kind != SERVER_NAME {
            continue;
        }
        // "There MUST NOT be more than one extension of the same type."
        if std::mem::replace(&mut seen, true) {
            return None;
        }
        let mut body = Bytes(body);
        let mut list = Bytes(body.vec16()?);
        if !body.0.is_empty() {
            return None;
        }
        while !list.0.is_empty() {
            let (kind, name) = (list.u8()?, list.vec16()?);
            if kind == HOST_NAME {
                // Nor more than one name of the same type.
                if found.is_some() || name.is_empty() {
                    return None;
                }
                found = Some(name);
            }
        }
    }
    Some(found.and_then(|name| String::from_utf8(name.to_vec()).ok()))
}

/// What is left to read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn vec8(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    fn vec16(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }
}

#[cfg(test)]
mod tests;
