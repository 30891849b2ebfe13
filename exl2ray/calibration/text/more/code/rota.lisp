;;;; rota.lisp --- lifeboat crew rota, Common Lisp
;;;;
;;;; Conditions and restarts earn their keep here: when the generator finds nobody for a watch, the
;;;; coxswain decides at the prompt what to do, and the computation goes on from there.

(defpackage #:rota
  (:use #:cl)
  (:shadow #:member)
  (:export #:make-crew #:plan #:no-volunteer #:print-rota))

(in-package #:rota)

(defclass member ()
  ((name      :initarg :name   :reader name)
   (tickets   :initarg :tickets :initform '() :reader tickets
              :documentation "Subset of (:helm :engine :first-aid :radio).")
   (minutes   :initarg :minutes :initform 8 :reader minutes
              :documentation "From bed to boathouse.")
   (away      :initform (make-hash-table) :reader away)
   (served    :initform 0 :accessor served)))

(defmethod print-object ((m member) stream)
  (print-unreadable-object (m stream :type t)
    (format stream "~A~@[ ~{~(~A~)~^/~}~]" (name m) (tickets m))))

(define-condition no-volunteer (error)
  ((day    :initarg :day    :reader day)
   (ticket :initarg :ticket :reader ticket))
  (:report (lambda (c stream)
             (format stream "Nobody with a ticket for ~(~A~) is free on day ~D."
                     (ticket c) (day c)))))

(defparameter *required* '(:helm :engine :first-aid)
  "One crew member may cover at most one of these.")

(defparameter *crew-size* 4)

(defun free-p (m day)
  (not (gethash day (away m))))

(defun mark-away (m &rest days)
  (dolist (d days m)
    (setf (gethash d (away m)) t)))

(defun fairest (candidates)
  "Least served first; among equals whoever lives nearest."
  (stable-sort (sort (copy-list candidates) #'< :key #'minutes)
               #'< :key #'served))

(defun choose (crew taken day ticket)
  (loop
    (restart-case
        (let ((who (first (fairest
                           (remove-if-not
                            (lambda (m)
                              (and (free-p m day)
                                   (not (find m taken))
                                   (or (null ticket) (find ticket (tickets m)))))
                            crew)))))
          (return (or who (error 'no-volunteer :day day :ticket ticket))))
      (ask-back (name)
        :report "Call somebody back from leave."
        :interactive (lambda ()
                       (format *query-io* "~&Who? ")
                       (list (read-line *query-io*)))
        (let ((m (find name crew :key #'name :test #'string-equal)))
          (when m (remhash day (away m)))))
      (go-without ()
        :report "Put the boat off service for this role."
        (return nil)))))

(defun watch (crew day)
  (let ((taken '()))
    (dolist (ticket *required*)
      (let ((m (choose crew taken day ticket)))
        (when m (push m taken))))
    (loop while (< (length taken) *crew-size*)
          do (let ((m (choose crew taken day nil)))
               (if m (push m taken) (return))))
    (mapc (lambda (m) (incf (served m))) taken)
    (nreverse taken)))

(defun plan (crew days &key (on-gap :signal))
  "List of (DAY . MEMBERS). ON-GAP is :SIGNAL or :OFF-SERVICE."
  (handler-bind
      ((no-volunteer
         (lambda (c)
           (declare (ignorable c))
           (ecase on-gap
             (:signal nil)
             (:off-service (invoke-restart 'go-without))))))
    (loop for day from 1 to days
          collect (cons day (watch crew day)))))

(defmacro with-crew ((&rest specs) &body body)
  "Each of SPECS is (variable name minutes &rest tickets)."
  `(let ,(loop for (var name minutes . tickets) in specs
               collect `(,var (make-instance 'member :name ,name :minutes ,minutes
                                                     :tickets ',tickets)))
     (let ((crew (list ,@(mapcar #'first specs))))
       ,@body)))

(defun print-rota (rota &optional (stream *standard-output*))
  (format stream "~:{~&~2D  ~@{~12A~}~}~%"
          (loop for (day . members) in rota
                collect (cons day (mapcar #'name members)))))

#+(or)
(with-crew ((a "Morwenna" 4 :helm :radio) (b "Jory" 9 :engine) (c "Tamsin" 6 :first-aid :helm)
            (d "Piran" 12 :engine :first-aid) (e "Lowena" 3))
  (mark-away b 3 4)
  (mark-away d 4)
  (print-rota (plan crew 7 :on-gap :off-service)))
