//! The manager under test: a bench that stores at once, rules one by one, and a random world.

mod bench;
mod broadcast;
mod creation;
mod deferred;
mod devices;
mod ends;
mod enrolment;
mod evening;
mod force;
mod making;
mod plans;
mod rebuild;
mod redistribution;
mod rejoin;
mod retiring;
mod rules;
mod slow;
mod status;
mod surplus;
mod topology;
mod world;

use bench::{Bench, map_of};
