//! Things under numbers that are never given twice.

use std::collections::VecDeque;

/// Things by number, counted from 1. Most live shortly, so a place in a queue finds each without hashing.
pub struct Numbered<T> {
    /// The number of the first place.
    first: u64,
    places: VecDeque<Option<T>>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { first: 1, places: VecDeque::new() }
    }
}

impl<T> Numbered<T> {
    fn place(&self, number: u64) -> Option<usize> {
        usize::try_from(number.checked_sub(self.first)?).ok()
    }

    /// Keeps it; its number.
    pub fn put(&mut self, item: T) -> u64 {
        self.places.push_back(Some(item));
        self.first + self.places.len() as u64 - 1
    }

    /// What has that number, if it was not taken.
    pub fn get(&self, number: u64) -> Option<&T> {
        self.places.get(self.place(number)?)?.as_ref()
    }

    /// To change.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let place = self.place(number)?;
        self.places.get_mut(place)?.as_mut()
    }

    /// Takes it out; its number means nothing from then on.
    pub fn take(&mut self, number: u64) -> Option<T> {
        let place = self.place(number)?;
        let item = self.places.get_mut(place)?.take();
        while let Some(None) = self.places.front() {
            self.places.pop_front();
            self.first += 1;
        }
        item
    }

    /// All, by number.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        (self.first..).zip(&self.places).filter_map(|(number, item)| Some((number, item.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_means_one_thing_for_ever() {
        let mut things = Numbered::default();
        let (a, b) = (things.put('a'), things.put('b'));
        assert_eq!((things.take(a), things.take(a), things.get(b)), (Some('a'), None, Some(&'b')));
        assert_eq!(things.take(b), Some('b'));
        let c = things.put('c');
        assert!(c > b);
        assert_eq!((things.get(a), things.get(b), things.iter().count()), (None, None, 1));
        assert_eq!(things.get(0), None);
    }
}
