defmodule StarweaveImage.Queue.Places do
  @moduledoc false
  # What subscribers of a request are told about its place in the queue, and when that has changed. Pure; the queue
  # sends the events.

  alias StarweaveImage.Queue.{Job, Schedule}

  @type event :: {:queued, map}

  @doc "The event with a waiting request's position and its estimated wait."
  @spec event(Schedule.t(), String.t()) :: event
  def event(schedule, id) do
    position = Schedule.position(schedule, id)

    {:queued,
     %{
       position: position,
       attempt: Schedule.attempts(schedule, id) + 1,
       estimated_start_ms: Schedule.wait_ms(schedule, position)
     }}
  end

  @doc "The events for a late subscriber, so that a page that is reloaded shows the present state."
  @spec late(Schedule.t(), Job.t()) :: [{atom, map}]
  def late(_schedule, %{status: :ending}), do: []

  def late(schedule, %{request: %{id: id}} = job) do
    if is_integer(Schedule.place(schedule, id)),
      do: Job.so_far(job),
      else: [event(schedule, id)]
  end

  @doc """
  The watched jobs that have moved up since their subscribers were last told; and whether any waiting job is watched.
  """
  @spec news(Schedule.t(), %{String.t() => Job.t()}) :: {[Job.t()], watched? :: boolean}
  def news(schedule, jobs) do
    watched =
      for {id, position} <- Enum.with_index(Schedule.order(schedule), 1),
          %{subscribers: [_ | _]} = job <- [jobs[id]],
          do: {job, position}

    {for({job, position} <- watched, job.told != position, do: job), watched != []}
  end
end
