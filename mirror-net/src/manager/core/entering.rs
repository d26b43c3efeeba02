//! What enters: the nodes of which a cluster is made, and disks and nodes that come later.

use super::super::create::{self, Creation};
use super::super::enrolment::{self, Enrolment};
use super::{Manager, Then};
use crate::config::ClusterFile;
use crate::control::{DiskContent, EnrolOrder, OperatorReply};
use crate::ids::{ClusterId, MapVersion};
use crate::manager::{ConnectionId, Output, Ticket};

impl Manager {
    pub(super) fn create(&mut self, now_ms: u64, request: (Ticket, &ClusterFile, ClusterId, bool)) {
        let refused = if let Some(map) = &self.map {
            Some(format!(
                "there is a cluster already, {}; to begin anew, stop the manager and move its state directory away",
                map.cluster_name
            ))
        } else if self.creation.is_some() || self.storing.is_some() {
            Some("a cluster is being created at this moment; wait for it".to_owned())
        } else {
            let outputs = &mut self.outputs;
            let started = Creation::start(now_ms, request, &self.registry, &mut |output| {
                outputs.push_back(output);
            });
            match started {
                Ok(creation) => {
                    self.creation = Some(creation);
                    None
                }
                Err(reason) => Some(reason),
            }
        };
        if let Some(reason) = refused {
            self.reply(request.0, OperatorReply::Refused { reason });
        }
    }

    pub(super) fn advance_creation(&mut self, now_ms: u64) {
        if self.storing.is_some() {
            return;
        }
        let Some(creation) = &mut self.creation else { return };
        let outputs = &mut self.outputs;
        match creation.progress(now_ms, &mut |output| outputs.push_back(output)) {
            create::Progress::Waiting => {}
            create::Progress::Done(proposal) => self.store(proposal, Then::Created),
            create::Progress::Failed { reason, close } => {
                let ticket = creation.ticket;
                self.creation = None;
                self.reply(ticket, OperatorReply::Refused { reason });
                for connection in close {
                    self.outputs.push_back(Output::Close { connection });
                }
            }
        }
    }

    /// The nodes registered with blank disks; what they formatted is known from their answers.
    pub(super) fn enter_formatted_disks(&mut self) {
        let (Some(creation), Some(map)) = (&self.creation, &self.map) else { return };
        let formatted = creation.formatted_disks();
        for (name, entry) in self.registry.iter_mut() {
            entry.adopted = MapVersion(0);
            // One that restarted since has registered with what is on its disks now.
            if creation.process_of(name) != Some(entry.process) {
                continue;
            }
            for (disk_name, disk, attach) in formatted.get(name).into_iter().flatten() {
                if let Some(inventory) = entry.disks.iter_mut().find(|inventory| inventory.name == *disk_name)
                {
                    inventory.content = DiskContent::Ours { cluster: map.cluster, disk: *disk };
                    inventory.attach = *attach;
                }
            }
        }
    }

    pub(super) fn enrol(&mut self, now_ms: u64, ticket: Ticket, order: &EnrolOrder) {
        let started = match &self.map {
            None => Err("no cluster has been created yet".to_owned()),
            Some(_) if self.enrolment.is_some() => {
                Err("something else enters the cluster at this moment; wait for it".to_owned())
            }
            Some(map) => {
                let outputs = &mut self.outputs;
                let request = (ticket, order);
                Enrolment::start(now_ms, request, map, &self.registry, &mut |output| {
                    outputs.push_back(output)
                })
            }
        };
        match started {
            Ok(enrolment) => self.enrolment = Some(enrolment),
            Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
        }
    }

    pub(super) fn advance_enrolment(&mut self, now_ms: u64) {
        if self.storing.is_some() {
            return;
        }
        let Some(mut enrolment) = self.enrolment.take() else { return };
        let Some(map) = &self.map else { return };
        let progress = enrolment.progress(map, &self.situation(now_ms));
        let ticket = enrolment.ticket;
        self.enrolment = Some(enrolment);
        match progress {
            enrolment::Progress::Waiting => {}
            enrolment::Progress::Shown(lines) => {
                self.enrolment = None;
                self.reply(ticket, OperatorReply::Done { lines });
            }
            enrolment::Progress::Reserve(change) => self.propose(change, Then::Reserved),
            enrolment::Progress::Enter(change) => {
                let lines = change.why.clone();
                self.propose(change, Then::Entered { lines });
            }
            enrolment::Progress::Failed { reason, close } => self.enrolment_failed(reason, close),
        }
    }

    pub(super) fn enrolment_failed(&mut self, reason: String, close: Option<ConnectionId>) {
        let Some(enrolment) = self.enrolment.take() else { return };
        self.reply(enrolment.ticket, OperatorReply::Refused { reason });
        self.outputs.extend(close.map(|connection| Output::Close { connection }));
    }

    /// The ids are stored.
    pub(super) fn format_newcomers(&mut self, now_ms: u64) {
        let (Some(enrolment), Some(map)) = (&mut self.enrolment, &self.map) else { return };
        let outputs = &mut self.outputs;
        enrolment.reserved(now_ms, map, &mut |output| outputs.push_back(output));
    }

    /// What enters is in the map.
    pub(super) fn enter_newcomers(&mut self) {
        if let (Some(enrolment), Some(map)) = (&self.enrolment, &self.map) {
            enrolment.enter_registry(map, &mut self.registry);
        }
    }

    pub(super) fn welcome(&mut self, mut lines: Vec<String>) {
        let Some(enrolment) = self.enrolment.take() else { return };
        lines.push(enrolment.farewell());
        self.reply(enrolment.ticket, OperatorReply::Done { lines });
        // It may have connected anew since it formatted, and waits there.
        let waiting = enrolment.newcomer().and_then(|name| self.registry.get(name));
        let waiting = waiting.filter(|entry| entry.connected && entry.session.is_none());
        self.outputs.extend(waiting.map(|entry| Output::GiveSession { connection: entry.connection }));
    }

    /// A connection whose node may owe an answer is gone.
    pub(super) fn enrolled_by_gone(&mut self, connection: ConnectionId) {
        if let Some(creation) = &mut self.creation {
            creation.disconnected(connection);
        }
        if let Some(enrolment) = &mut self.enrolment {
            enrolment.disconnected(connection);
        }
    }
}
