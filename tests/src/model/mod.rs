//! The replication protocol in a model checker: every state that small clusters can reach.
//!
//! Three models share one search ([`checker`]): [`replication`] is one slice with data on two or three
//! nodes; [`roles`] is two slices with roles, epochs, leases and claims only; [`exporters`] is what reaches
//! the copies from exporters that come, go and repeat themselves. [`scenarios`] lists the bounds under which
//! each is searched to its end, and for every rule of the protocol ([`rules`]) a scenario that breaks, or
//! never heals, once that rule alone is switched off. `mirror-model` runs and tells them.
//!
//! # What runs shipped code, and what is abstract
//! Every change of the map in the first two models is made by the shipped code ([`manager`]): a real
//! `DistributionMap` is built from the state, and
//! - repair (promotion, readmission, the loss generation), staleness on a primary's request, the operator's
//!   failover and the permission to export come from a real `Manager`, which hears registrations and messages
//!   as in the daemon, by what it then wants stored or sent;
//! - hand-overs that leave nobody stale, moves of a claim and the marks `syncing` and `in_sync` are single
//!   `Verb`s that `DistributionMap::apply` carries out and validates; *when* a primary may have a mark made
//!   (rule 6, the request's epoch and incarnation) is modelled.
//!
//! Abstract are the nodes. A disk is a durable value and perhaps a newer cached one for each region; values
//! are numbers of writes. A message arrives at any time, in any order, once, or never. A session is whether
//! the two sides mean the same one. Time is not there: a lease is a token that is gone at any moment, and its
//! grantor may act when its holder has none (the clocks' margin is what makes that true). A secondary's disk
//! write is one step with the message that brings it, so a message in flight stands for it too. The session
//! of two nodes and that of a slice are one; leases need none. Epochs and incarnations are compared and never
//! counted, so there is no bound on their number: a bound that is hit is reported as a violation, not cut off.
//! A node adopts the newest map, and may miss those between; a map that reaches a node late, after a newer
//! one was stored, is not modelled.
//!
//! # What must hold
//! - No acknowledged write is lost, and reads are linearizable: for each region all histories that fit what
//!   its user saw are kept ([`replication::register`]), and what a primary could return now must be explained
//!   by one. Losing what no FLUSH covered is lawful only when the manager has raised the loss generation.
//! - At most one node can acknowledge at a time, whatever the epoch; in [`roles`] also: no other can read.
//! - Only a member is promoted, and under the incarnation that the map names, or alone by readmission.
//! - A member and any other copy that has a mask differ only where a write is in flight or a mask says so.
//! - Two exporters never start under one claim, and no write of the older is acknowledged once the newer runs.
//! - From every state "all copies in sync and equal, everybody up, readable" can be reached by steps that
//!   are neither faults nor requests of a user: a backward search over the whole graph.
//!
//! # What is missing here
//! FUA, torn sectors, validity and reused slots, discards, read repair, full disks and slots, the bounds of
//! windows, deferred commit: those are the simulator's. Forced promotion is in neither. The engine itself
//! is not run by the model (its state is no small value); it runs under the same rules in the simulator.
//!
//! # What the search said of special cases
//! - *A lease counts only if its grantor had adopted the slice's epoch* is needed (`lease-epoch`): two
//!   hand-overs that the grantor never sees apart leave the first new primary a lease that nobody waits for.
//! - *A request to make a copy a member* must name the incarnation that has everything (`ask-incarnation`). That
//!   it is void once the epoch has changed (`ask-version`) is a second fence since a secondary is known by its
//!   attachment alone.
//! - *Reconciling on a session that the same primary reopens within one epoch* may be left out for a member
//!   of the same attachment, on two and on three nodes (`reconcile-reopened`): whatever was not acknowledged
//!   is sent again, and what is still to be copied is remembered. For a copy that is being filled it may not
//!   (`reconcile-syncing`), since nobody waits for it while the session is down; nor for a member over a
//!   change of epoch, even if the primary never saw itself without its role (`reconcile-continuous`).
//! - *Second fences*, without which nothing breaks in these bounds: refusing older epochs where sessions are
//!   fenced (`epoch-fence`), and treating a member that was attached anew as none (`member-incarnation`),
//!   because the manager does not promote it and its lost cache is dirty in a mask.
//!
//! # For the protocol's page
//! The rules are searched exhaustively: one slice with data on two nodes (two writes, two crashes of daemon or
//! machine, a partition, moves of the role, clearing, flushes, a new copy, free leases) and on three (one
//! write, two crashes, a partition), and two slices with roles, leases and claims, each to the last state.
//! The largest (three nodes, `--long`) has 28 million states. The map and the manager are the shipped ones. For each rule `mirror-model --without RULE` shows the
//! shortest story of what happens when it alone is missing; `mirror-model --rules` lists them.

pub mod checker;
pub mod exporters;
pub mod manager;
pub mod replication;
pub mod roles;
pub mod rules;
pub mod scenarios;
